// The spectral step's entry points by C names: a library of its own is soon built, with AddressSanitizer too.
#include "device.cuh"
#include "stable_rnn/cuda.h"

using namespace stable_rnn;

extern "C" __attribute__((visibility("default"))) const char* entry_step(
    int scale, int iterations, int64_t fresh, uint64_t seed, int64_t count, const SpectralMatrix* matrices,
    const double* bounds, double* norms, int64_t* near, void* workspace, int64_t workspace_bytes) {
  return spectral_step_cuda({0, scale, iterations, fresh, seed, count, matrices, bounds, norms, near},
                            {0, nullptr, workspace, workspace_bytes});
}

extern "C" __attribute__((visibility("default"))) int64_t entry_workspace(int64_t count,
                                                                          const SpectralMatrix* matrices) {
  SpectralParams params{};
  CudaLimits limits;
  params.count = count;
  params.matrices = matrices;
  return cuda_limits(0, &limits) ? -1 : spectral_workspace_cuda(params, limits);
}
