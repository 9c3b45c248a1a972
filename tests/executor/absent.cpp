// Entry points that csrc/bindings.cpp names and the executor's module does not hold: the CPU kernels, and CUDA ones while unwritten.
#include "stable_rnn/cuda.h"

#define ABSENT(name, ...) \
  [[gnu::weak]] const char* name(__VA_ARGS__) { return #name " is not part of the executor's module"; }

namespace stable_rnn {

ABSENT(recurrence_forward_cpu, const ForwardParams&)
ABSENT(recurrence_backward_cpu, const BackwardParams&)
ABSENT(recurrence_windowed_backward_cpu, const WindowedBackwardParams&)
ABSENT(scanned_forward_cpu, const ForwardParams&, const CascadeGroups&)
ABSENT(scanned_backward_cpu, const BackwardParams&, const CascadeGroups&)
ABSENT(cascade_reads_cpu, const CascadeReadsParams&)
ABSENT(input_projection_cpu, const InputProjectionParams&)
ABSENT(product_cpu, const ProductParams&)
ABSENT(cell_step_cpu, const CellStepParams&)
ABSENT(spectral_step_cpu, const SpectralParams&)
ABSENT(recurrence_forward_cuda, const ForwardParams&, const CudaLaunch&)
ABSENT(recurrence_backward_cuda, const BackwardParams&, const CudaLaunch&)
ABSENT(spectral_step_cuda, const SpectralParams&, const CudaLaunch&)

[[gnu::weak]] CudaTiling recurrence_tiling_cuda(bool, int, int, int64_t, int64_t, int64_t, const CudaLimits&) {
  CudaTiling tiling{};
  tiling.message = "recurrence_tiling_cuda is not part of the executor's module";
  return tiling;
}
[[gnu::weak]] double step_clocks_cuda(bool, int, int, int64_t, int64_t, const CudaTiling&, const CudaLimits&,
                                      const StepCosts&) {
  return -1;
}
[[gnu::weak]] int64_t spectral_workspace_cuda(const SpectralParams&, const CudaLimits&) { return 0; }

}   // namespace stable_rnn
