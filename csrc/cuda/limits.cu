// What a device offers, and whether there is one.
#include <cstdio>
#include <mutex>

#include "device.cuh"
#include "stable_rnn/cuda.h"

#ifndef STABLE_RNN_EXECUTOR   // tests/executor/executor.cpp has its own: limits are what a test sets
namespace stable_rnn {
namespace {

__global__ void __launch_bounds__(32) probe(const int) {}

// Blocks of the largest cluster that this device schedules (some parts of a chip may have fewer SMs than others, or be cut off).
int largest_cluster(int arch, int64_t shared_bytes) {
  if (arch < 90) return 1;
  const auto kernel = reinterpret_cast<const void*>(&probe);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(16);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = shared_bytes;
  int size = 0;
  if (cuda_message(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes))) ||
      cuda_message(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) ||
      cuda_message(cudaOccupancyMaxPotentialClusterSize(&size, kernel, &config)))
    return 1;
  return size < 1 ? 1 : size;
}

const char* query(int device, CudaLimits* limits) {
  int major, sms, shared_bytes;
  if (const char* problem = cuda_message(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)))
    return problem;
  if (const char* problem = cuda_message(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)))
    return problem;
  if (const char* problem =
          cuda_message(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)))
    return problem;
  *limits = {major * 10, sms, shared_bytes, 1};
  return with_device(device, [&]() -> const char* {
    cudaFuncAttributes attributes;   // an error where nothing was compiled for this device
    if (const char* problem = cuda_message(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&probe))))
      return problem;
    limits->max_cluster = largest_cluster(limits->arch, limits->shared_bytes);
    return nullptr;
  });
}

}   // namespace

const char* cuda_driver_problem() {
  static const struct Problem {
    char text[200] = "";
    Problem() {
      int driver = 0, devices = 0;
      if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        std::snprintf(text, sizeof text, "no NVIDIA driver was found (the kernels are built with CUDA %d.%d)",
                      CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
      else if (driver / 1000 < CUDART_VERSION / 1000)
        std::snprintf(text, sizeof text,
                      "the NVIDIA driver is too old: it supports CUDA %d.%d, the kernels are built with CUDA %d.%d",
                      driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
      else if (const char* problem = cuda_message(cudaGetDeviceCount(&devices)))
        std::snprintf(text, sizeof text,
                      "no CUDA device can be used (driver for CUDA %d.%d, kernels built with CUDA %d.%d): %s",
                      driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, problem);
    }
  } problem;
  return *problem.text ? problem.text : nullptr;
}

// Asked of each device once: the answer does not change, and launches ask every time.
const char* cuda_limits(int device, CudaLimits* limits) {
  constexpr int most = 64;
  static std::mutex mutex;
  static CudaLimits known[most];
  if (const char* problem = cuda_driver_problem()) return problem;
  if (device < 0 || device >= most) return "device: no such CUDA device";
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[device].arch == 0) {
    CudaLimits found;
    if (const char* problem = query(device, &found)) return problem;
    known[device] = found;
  }
  *limits = known[device];
  return nullptr;
}

const char* cuda_clock(int device, double* hertz) {
  if (const char* problem = cuda_driver_problem()) return problem;
  int kilohertz;
  if (const char* problem = cuda_message(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, device)))
    return problem;
  *hertz = 1e3 * kilohertz;
  return nullptr;
}

}   // namespace stable_rnn
#endif
