// Everything that the kernels ask of the device, and how they are launched. Kernels use nothing else (no static __shared__, no intrinsics),
// so the same source also runs on the CPU: with STABLE_RNN_EXECUTOR, tests/executor/executor.h gives these names to g++.
//
// Blocks and grids are one-dimensional, a block has a multiple of 32 threads. "Warp" functions must be called by all 32 lanes together.
// Kernels are `template <...> __global__ void name(const Params p)`. Compiled for sm_80 and up; clusters exist from sm_90 on,
// wgmma on sm_90a alone.
#pragma once
#include <cstdint>
#include <cstring>

#include "stable_rnn/cell.h"

namespace stable_rnn {

// Storage types (F16 is the name of the DType). Conversion rounds to nearest even; a NaN becomes 0x7fff, on host and device.
struct Bf16 {
  uint16_t bits;
  Bf16() = default;
  STABLE_RNN_HD explicit Bf16(float value) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    uint32_t u;
    std::memcpy(&u, &value, 4);
    bits = static_cast<uint16_t>(value != value ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
  }
  STABLE_RNN_HD operator float() const {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
  }
};

struct Half {
  uint16_t bits;
  Half() = default;
  STABLE_RNN_HD explicit Half(float value) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    uint32_t u, sum;
    std::memcpy(&u, &value, 4);
    const uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    std::memcpy(&value, &u, 4);
    const float shifted = value + 0.5f;   // rounds to a multiple of 2^-24, the smallest step of the type
    std::memcpy(&sum, &shifted, 4);
    const uint32_t small = sum - 0x3f000000, normal = ((u + 0xfff + (u >> 13 & 1)) >> 13) - (112 << 10);
    bits = static_cast<uint16_t>(value != value ? 0x7fff
                                                : sign | (u >= 0x477ff000  ? 0x7c00
                                                          : u < 0x38800000 ? small
                                                                           : normal));
#endif
  }
  STABLE_RNN_HD operator float() const {
    float value;
#ifdef __CUDA_ARCH__
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
#else
    const bool special = (bits & 0x7c00) == 0x7c00;   // infinite or NaN
    uint32_t u = (bits & 0x7fffu) << 13 | (special ? 0x7f800000u : 0u);
    std::memcpy(&value, &u, 4);
    if (!special) value *= 0x1p112f;
    std::memcpy(&u, &value, 4);
    u |= (bits & 0x8000u) << 16;
    std::memcpy(&value, &u, 4);
#endif
    return value;
  }
};

// Product types of mma().
struct Bf16Tag {};
struct F16Tag {};
struct Tf32Tag {};

// What launch() needs. cluster: blocks of a cluster, 1 for none. cooperative: all blocks run at the same time, so they may wait for flags.
struct Grid {
  int blocks, threads, cluster;
  int64_t shared_bytes;
  bool cooperative;
  void* stream;
};

// Null, or why no kernel can run here: no driver, or one too old for the runtime that is linked in (both versions are named).
const char* cuda_driver_problem();

}   // namespace stable_rnn

#ifdef STABLE_RNN_EXECUTOR
#include "executor.h"
#else
#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the kernels need sm_80 or later"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define STABLE_RNN_CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define STABLE_RNN_CLUSTER_ASM(...) __trap()   // launch() never puts blocks into clusters there
#endif

namespace stable_rnn {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool clusters_exist = false;
#else
constexpr bool clusters_exist = true;
#endif

// --- where a thread is

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int thread_count() { return blockDim.x; }
__device__ __forceinline__ int block_index() { return blockIdx.x; }
__device__ __forceinline__ int block_count() { return gridDim.x; }

extern __shared__ __align__(128) char stable_rnn_shared_memory[];
__device__ __forceinline__ char* shared_memory() { return stable_rnn_shared_memory; }   // Grid::shared_bytes of it
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- block and warp

// Addresses that follow from the value are worked out where they are used; else the compiler keeps them all in registers.
__device__ __forceinline__ int not_kept(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

template <class T>
__device__ __forceinline__ T shuffle(T value, int source_lane) {   // 0 <= source_lane < 32
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32-bit and 64-bit values");
  return __shfl_sync(0xffffffffu, value, source_lane);
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {   // from lane ^ mask
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32-bit and 64-bit values");
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// --- c += a b on tensor cores, one warp: a (16, K) by rows, b (K, 8) by columns, K = 16 (16-bit) or 8 (TF32, its inputs from to_tf32).
// With g = lane / 4, t = lane % 4:   c[0,1] = C[g][2t, 2t+1],  c[2,3] = C[g+8][2t, 2t+1]
//   16-bit, two to a register:       a = A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..];   b = B[2t..][g], B[2t+8..][g]
//   TF32:                            a = A[g][t],    A[g+8][t],    A[g][t+4],    A[g+8][t+4];      b = B[t][g],    B[t+4][g]

#define STABLE_RNN_MMA(shape, types)                                                                               \
  asm("mma.sync.aligned." shape ".row.col.f32." types ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16Tag) {
  STABLE_RNN_MMA("m16n8k16", "bf16.bf16");
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F16Tag) {
  STABLE_RNN_MMA("m16n8k16", "f16.f16");
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tf32Tag) {
  STABLE_RNN_MMA("m16n8k8", "tf32.tf32");
}
#undef STABLE_RNN_MMA

__device__ __forceinline__ uint32_t
to_tf32(float value) {   // the nearest with 10 bits of mantissa, ties away from zero
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Four matrices of 8 x 8 16-bit values from shared memory, transposed: a thread says where 16 bytes lie, row `lane % 8` of matrix `lane / 8`,
// and gets words[i] = M_i[2t][g], M_i[2t+1][g].
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- d += a b on the tensor cores of a warpgroup, sm_90a alone: four warps side by side, the first a multiple of four, all with the same b and
// octets. Each warp's 16 rows of a (16, 16) lie in its registers and its sums come there, both as those of mma(); b (16, 8 octets) lies in
// shared memory, see wgmma_matrix().
// It runs by itself: issue, commit the group, wait until at most `pending` groups are under way. Until then d and a are not to be touched
// and b not to be written. Before an issue that follows any other use of the registers comes wgmma_fence().
// b is read by another way than by loads (PTX: the async proxy): after stores to it, also to and from other blocks, and after copy_wait(),
// comes proxy_fence() by the thread that stored, and then the barrier that says so to the readers.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define STABLE_RNN_WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
#define STABLE_RNN_WGMMA_ASM(...) __trap()
#endif
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool wgmma_exists = false;
#else
constexpr bool wgmma_exists = true;
#endif

// Values of 16 bits, k of a column side by side. 8 columns x 8 k are 128 bytes, 16 of each column; the next 8 k lie `along` bytes further,
// the next 8 columns `across`. All of it, and the address, are multiples of 16. The next 16 k: + 2 * along / 16.
__device__ __forceinline__ uint64_t wgmma_matrix(const void* shared, int along, int across) {   // no swizzle
  const auto encoded = [](uint32_t bytes) { return uint64_t((bytes & 0x3ffff) >> 4); };
  return encoded(shared_address(shared)) | encoded(along) << 16 | encoded(across) << 32;
}
__device__ __forceinline__ void proxy_fence() { STABLE_RNN_WGMMA_ASM("fence.proxy.async;" :: : "memory"); }
__device__ __forceinline__ void wgmma_fence() { STABLE_RNN_WGMMA_ASM("wgmma.fence.sync.aligned;" :: : "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  STABLE_RNN_WGMMA_ASM("wgmma.commit_group.sync.aligned;" :: : "memory");
}
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  STABLE_RNN_WGMMA_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Before the first wgmma_fence and after the last wait: the compiler, for which an issue is an ordinary instruction, moves no use of the
// sums past this.
template <int rows, int octets>
__device__ __forceinline__ void wgmma_pin(float (&d)[rows][octets][4]) {
#pragma unroll
  for (int i = 0; i < 4 * rows * octets; ++i)
    asm volatile("" : "+f"(d[i / 4 / octets][i / 4 % octets][i % 4])::"memory");
}

#define STABLE_RNN_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define STABLE_RNN_WGMMA_32(types)                                                                                     \
  STABLE_RNN_WGMMA_ASM("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." types    \
                       " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, add, 1, 1, " \
                       "0; }" : STABLE_RNN_FOUR(0),                                                                    \
                       STABLE_RNN_FOUR(1), STABLE_RNN_FOUR(2), STABLE_RNN_FOUR(3) : "r"(a[0]), "r"(a[1]), "r"(a[2]),   \
                       "r"(a[3]), "l"(b))
#define STABLE_RNN_WGMMA_64(types)                                                                           \
  STABLE_RNN_WGMMA_ASM(                                                                                      \
      "{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." types           \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
      "%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, add, 1, 1, 0; }" : STABLE_RNN_FOUR(0),                  \
      STABLE_RNN_FOUR(1), STABLE_RNN_FOUR(2), STABLE_RNN_FOUR(3), STABLE_RNN_FOUR(4), STABLE_RNN_FOUR(5),    \
      STABLE_RNN_FOUR(6), STABLE_RNN_FOUR(7) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

__device__ __forceinline__ void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, Bf16Tag) {
  STABLE_RNN_WGMMA_32("bf16.bf16");
}
__device__ __forceinline__ void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, Bf16Tag) {
  STABLE_RNN_WGMMA_64("bf16.bf16");
}
__device__ __forceinline__ void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b, F16Tag) {
  STABLE_RNN_WGMMA_32("f16.f16");
}
__device__ __forceinline__ void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, F16Tag) {
  STABLE_RNN_WGMMA_64("f16.f16");
}
#undef STABLE_RNN_WGMMA_64
#undef STABLE_RNN_WGMMA_32
#undef STABLE_RNN_FOUR
#undef STABLE_RNN_WGMMA_ASM

// --- copies from global to shared memory that overlap with what follows: issue, commit the group, wait until at most `pending` groups of
// this thread are under way; then a block_sync() before other threads read. Both addresses are multiples of `bytes`.

template <int bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "4, 8 or 16 bytes");
  const uint32_t to = shared_address(shared);
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- cluster. Every thread of every block arrives, and then waits, in turn; what was written before arriving is seen after waiting.
// Another block's shared memory may be touched only between its first and its last cluster_sync().

__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size = 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
__device__ __forceinline__ void cluster_arrive() {
  STABLE_RNN_CLUSTER_ASM("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
__device__ __forceinline__ void cluster_wait() {
  STABLE_RNN_CLUSTER_ASM("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

template <class T>
__device__ __forceinline__ T* cluster_map(
    T* shared, int rank) {   // the same place in the shared memory of block `rank` of the cluster
  T* there = shared;
  STABLE_RNN_CLUSTER_ASM("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
}

// --- transactions: stores to another block of the cluster that arrive by themselves, in any order, and are counted where they arrive.
// A barrier is 8 bytes of shared memory. Its phase ends after `count` arrivals and once as many bytes have come as arrivals of this phase
// expect; then the next one begins. What a thread of this block did before it arrived, and what the stores brought, is seen after waiting.
// A thread waits for each phase in turn, and says its parity: 0 for the first. From sm_90 on, as clusters.

__device__ __forceinline__ void transactions_begin(uint64_t* barrier,
                                                   int count) {   // one thread, before a cluster_sync()
  STABLE_RNN_CLUSTER_ASM(
      "mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier)),
      "r"(count) : "memory");
}
__device__ __forceinline__ void transactions_arrive(uint64_t* barrier, int bytes) {   // and so many more are expected
  STABLE_RNN_CLUSTER_ASM(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes) : "memory");
}
__device__ __forceinline__ void transactions_wait(uint64_t* barrier, unsigned parity) {
  uint32_t ended = 0;
  do
    STABLE_RNN_CLUSTER_ASM(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
        "}" : "=r"(ended) : "r"(shared_address(barrier)),
        "r"(parity) : "memory");
  while (!ended);
}
__device__ __forceinline__ uint32_t cluster_address(const void* shared, int rank) {   // as cluster_map, in 32 bits
  uint32_t there = 0;
  STABLE_RNN_CLUSTER_ASM("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
  return there;
}
// `to` and `barrier` are places of this block's shared memory; the value goes to the same places of block `rank`, and counts there.
template <class T>
__device__ __forceinline__ void store_async(T* to, const T& value, uint64_t* barrier, int rank) {
  static_assert(sizeof(T) == 16, "16 bytes");
  uint32_t r[4];
  memcpy(r, &value, 16);
  STABLE_RNN_CLUSTER_ASM(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
          cluster_address(to, rank)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(cluster_address(barrier, rank)) : "memory");
}

// --- between blocks of a cooperative grid, through the L2 cache. Writing: data, block_sync(), then one thread signals. Reading: one thread
// waits, block_sync(), then data by load_l2 or copy_async<16> (the L1 cache may hold what was there before).

__device__ __forceinline__ void flag_signal(unsigned* flag, unsigned value) {
  asm volatile("fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void flag_wait(const unsigned* flag, unsigned at_least) {
  unsigned value;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  while (value < at_least);
}

template <class T>
__device__ __forceinline__ T load_l2(const T* global) {   // T of 4, 8 or 16 bytes, aligned to its size
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  constexpr int words = sizeof(T) / 4;
  uint32_t r[words];
  if constexpr (words == 1) asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(r[0]) : "l"(global));
  else if constexpr (words == 2)
    asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(global));
  else
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "l"(global));
  T value;
  memcpy(&value, r, sizeof(T));
  return value;
}

template <class T>
__device__ __forceinline__ void store_l2(T* global, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  constexpr int words = sizeof(T) / 4;
  uint32_t r[words];
  memcpy(r, &value, sizeof(T));
  if constexpr (words == 1) asm volatile("st.global.cg.u32 [%0], %1;" ::"l"(global), "r"(r[0]) : "memory");
  else if constexpr (words == 2)
    asm volatile("st.global.cg.v2.u32 [%0], {%1,%2};" ::"l"(global), "r"(r[0]), "r"(r[1]) : "memory");
  else
    asm volatile("st.global.cg.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(global), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
#undef STABLE_RNN_CLUSTER_ASM

// --- host

// Null where all is well, else CUDA's message; the runtime's record of it is cleared, so that no later call reports it again.
inline const char* cuda_message(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// The threads that a block of this kernel may have, as compiled for the current device.
template <class Params>
const char* most_threads(void (*kernel)(Params), int* threads) {
  cudaFuncAttributes attributes;
  const char* problem = cuda_message(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  if (!problem) *threads = attributes.maxThreadsPerBlock;
  return problem;
}

// Enqueues kernel(params); works while the stream is being captured. Returns null or CUDA's message.
template <class Params>
const char* launch(void (*kernel)(Params), const Grid& grid, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (grid.shared_bytes >
      48 * 1024) {   // always the most that there is: threads that launch the same kernel may not lower each other's
    int device, most;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess && grid.cluster > 8)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return cuda_message(error);

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(grid.stream);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (grid.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cuda_message(cudaLaunchKernelExC(&config, function, arguments));
}

// body() with `device` current; the caller's device is current again afterwards. body returns null or a message, and so does this.
template <class Body>
const char* with_device(int device, const Body& body) {
  if (const char* problem = cuda_driver_problem()) return problem;
  int before;
  if (const char* problem = cuda_message(cudaGetDevice(&before))) return problem;
  if (before == device) return body();
  if (const char* problem = cuda_message(cudaSetDevice(device))) return problem;
  const char* problem = body();
  const char* restored = cuda_message(cudaSetDevice(before));
  return problem ? problem : restored;
}

}   // namespace stable_rnn
#endif
