// The CUDA recurrence with a plan of the caller's choice, for test_cuda_recurrence.py (structs by address, see planned.py).
#include "recurrence_launch.h"

#define EXPORT extern "C" [[gnu::visibility("default")]]

using namespace stable_rnn;

EXPORT const char* planned_forward(const ForwardParams* p, const CudaPlan* plan, const CudaLaunch* at) {
  return recurrence_forward_planned(*p, *plan, *at);
}
EXPORT const char* planned_backward(const BackwardParams* p, const CudaPlan* plan, const CudaLaunch* at) {
  return recurrence_backward_planned(*p, *plan, *at);
}
// Fills in what follows from the rest of a plan.
EXPORT void complete_plan(bool backward, int cell, int dtype, int64_t hidden, CudaPlan* plan) {
  const Geometry g = geometry_of(backward, cell, dtype, hidden, *plan);
  plan->shared_bytes = g.shared_bytes;
  plan->workspace_bytes = workspace_parts(*plan, g).bytes;
}
EXPORT CudaPlan automatic_plan(bool backward, int cell, int dtype, int64_t hidden, int64_t out, int64_t entries,
                               const CudaLimits* limits) {
  return recurrence_plan_cuda(backward, cell, dtype, hidden, out, entries, *limits);
}
EXPORT const char* device_limits(CudaLimits* limits) { return cuda_limits(0, limits); }
EXPORT int allowed_warps(bool backward, int cell, int octets, bool held) {
  return most_warps(warp_layout(backward, cell), octets, held);
}
EXPORT void struct_sizes(int64_t* sizes) {
  const int64_t all[] = {sizeof(ForwardParams), sizeof(BackwardParams), sizeof(CudaPlan), sizeof(CudaLaunch),
                         sizeof(CudaLimits)};
  for (int i = 0; i < 5; ++i) sizes[i] = all[i];
}
