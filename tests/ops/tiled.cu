// The CUDA recurrence with a tiling of the caller's choice, for test_cuda_recurrence.py (structs by address, see tiled.py).
#include "recurrence_launch.h"

#define EXPORT extern "C" [[gnu::visibility("default")]]

using namespace stable_rnn;

EXPORT const char* tiled_forward(const ForwardParams* p, const CudaTiling* tiling, const CudaLaunch* at) {
  return recurrence_forward_tiled(*p, *tiling, *at);
}
EXPORT const char* tiled_backward(const BackwardParams* p, const CudaTiling* tiling, const CudaLaunch* at) {
  return recurrence_backward_tiled(*p, *tiling, *at);
}
// Fills in what follows from the rest of a tiling.
EXPORT void complete_tiling(bool backward, int cell, int dtype, int64_t hidden, CudaTiling* tiling) {
  const Geometry g = geometry_of(backward, cell, dtype, hidden, *tiling);
  tiling->shared_bytes = g.shared_bytes;
  tiling->workspace_bytes = workspace_parts(*tiling, g).bytes;
}
EXPORT CudaTiling automatic_tiling(bool backward, int cell, int dtype, int64_t hidden, int64_t out, int64_t entries,
                                   const CudaLimits* limits) {
  return recurrence_tiling_cuda(backward, cell, dtype, hidden, out, entries, *limits);
}
EXPORT const char* device_limits(CudaLimits* limits) { return cuda_limits(0, limits); }
EXPORT int allowed_warps(bool backward, int cell, int octets, bool held) {
  return most_warps(warp_layout(backward, cell), octets, held);
}
EXPORT void struct_sizes(int64_t* sizes) {
  const int64_t all[] = {sizeof(ForwardParams), sizeof(BackwardParams), sizeof(CudaTiling), sizeof(CudaLaunch),
                         sizeof(CudaLimits)};
  for (int i = 0; i < 5; ++i) sizes[i] = all[i];
}
