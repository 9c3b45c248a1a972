// A CPU block executor: gives g++ the names of csrc/cuda/device.cuh, so that a kernel's own source runs without a GPU.
//
// Threads are fibers of one CPU thread. The blocks of a cluster, or of a cooperative grid, run interleaved; those of an ordinary grid one
// after the other. A warp runs until all of its lanes wait or have ended, then the next one: whatever a kernel forgets to wait for has not
// happened yet, in one of the two schedules (threads and blocks ascending, or descending). Random schedules take warps in any order, some
// of them seldom.
//
// What a device would leave undefined is made visible here:
//   - shared memory is filled with NaN before a block's first thread runs and after its last one, and exactly as large as asked for;
//   - copy_async fills its destination with NaN; the data land at copy_wait, which demands that neither end was written in between;
//   - store_async fills its destination with NaN too; of some phases the data land at once, of others when nothing else can go on: block
//     after block, half of what is on its way at a time, in either order (in random schedules any at any time). A block that ends before all of it has come ends the launch;
//   - wgmma fills its sums with NaN; all of it happens at wgmma_wait, after other warps have had a turn: from the operands as they then are in
//     registers, and from shared memory as it was at the last proxy_fence of a warp of the block or, in a cluster, of any of its blocks;
//   - store_l2 of a value that is still that NaN ends the launch (other reads of it show in what is computed);
//   - lanes of a warp at different collectives, addresses that are not aligned or not in shared memory, and threads that all wait end the
//     launch with a message that names them;
//   - sums of mma are rounded towards zero, as tensor cores do; TF32 inputs lose the bits that they do not read.
// It cannot show races that need weaker memory than a CPU's, nor bank conflicts, nor anything about speed.
#pragma once
#include <cstdint>
#include <cstring>

#include "stable_rnn/cuda.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace stable_rnn {

namespace executor {

struct Position {   // of the thread that runs
  int thread, threads, block, blocks, cluster;
  char* shared;
};
extern Position position;

enum class Product { bf16, f16, tf32 };

const char* run(const Grid& grid, void (*body)(const void* call), const void* call);
uint64_t exchange(const char* name, uint64_t value, int source_lane);
void multiply(float* c, const uint32_t* a, const uint32_t* b, Product product);
void load_transposed(uint32_t* words, const void* row);
uint64_t matrix(const void* shared, int along, int across);
void publish();
void fence_products();
void issue(float* d, const uint32_t* a, uint64_t b, int octets, Product product);
void finish(int pending);
void copy(void* shared, const void* global, int bytes);
void land(int pending);
void* map(void* shared, int rank);
void send(void* to, const void* value, uint64_t* barrier, int rank);
void check_aligned(const char* name, const void* address, int bytes);
void check_written(const char* name, const void* value, int bytes);

}   // namespace executor

inline int thread_index() { return executor::position.thread; }
inline int thread_count() { return executor::position.threads; }
inline int block_index() { return executor::position.block; }
inline int block_count() { return executor::position.blocks; }
inline char* shared_memory() { return executor::position.shared; }

inline int not_kept(int value) { return value; }
void block_sync();
void warp_sync();

template <class T>
T shuffle_from(const char* name, T value, int source_lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32-bit and 64-bit values");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = executor::exchange(name, bits, source_lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
T shuffle(T value, int source_lane) {
  return shuffle_from("shuffle", value, source_lane);
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle_from("shuffle_xor", value, thread_index() % 32 ^ mask);
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16Tag) {
  executor::multiply(c, a, b, executor::Product::bf16);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F16Tag) {
  executor::multiply(c, a, b, executor::Product::f16);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tf32Tag) {
  executor::multiply(c, a, b, executor::Product::tf32);
}

inline void load_transposed(uint32_t (&words)[4], const void* row) { executor::load_transposed(words, row); }

constexpr bool wgmma_exists = true;
inline uint64_t wgmma_matrix(const void* shared, int along, int across) {
  return executor::matrix(shared, along, across);
}
inline void proxy_fence() { executor::publish(); }
inline void wgmma_fence() { executor::fence_products(); }
template <int octets>
void wgmma(float (&d)[octets][4], const uint32_t (&a)[4], uint64_t b, Bf16Tag) {
  static_assert(octets == 4 || octets == 8, "as on a device");
  executor::issue(d[0], a, b, octets, executor::Product::bf16);
}
template <int octets>
void wgmma(float (&d)[octets][4], const uint32_t (&a)[4], uint64_t b, F16Tag) {
  static_assert(octets == 4 || octets == 8, "as on a device");
  executor::issue(d[0], a, b, octets, executor::Product::f16);
}
void wgmma_commit();
template <int pending>
void wgmma_wait() {
  executor::finish(pending);
}
template <int rows, int octets>
void wgmma_pin(float (&)[rows][octets][4]) {}

inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? 0x7fffffff : (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

template <int bytes>
void copy_async(void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "4, 8 or 16 bytes");
  executor::copy(shared, global, bytes);
}
void copy_commit();
template <int pending>
void copy_wait() {
  executor::land(pending);
}

constexpr bool clusters_exist = true;
inline int cluster_rank() { return executor::position.block % executor::position.cluster; }
inline int cluster_size() { return executor::position.cluster; }
void cluster_arrive();
void cluster_wait();
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <class T>
T* cluster_map(T* shared, int rank) {
  return static_cast<T*>(executor::map(shared, rank));
}

void transactions_begin(uint64_t* barrier, int count);
void transactions_arrive(uint64_t* barrier, int bytes);
void transactions_wait(uint64_t* barrier, unsigned parity);
template <class T>
void store_async(T* to, const T& value, uint64_t* barrier, int rank) {
  static_assert(sizeof(T) == 16, "16 bytes");
  executor::send(to, &value, barrier, rank);
}

void flag_signal(unsigned* flag, unsigned value);
void flag_wait(const unsigned* flag, unsigned at_least);

template <class T>
T load_l2(const T* global) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  executor::check_aligned("load_l2", global, sizeof(T));
  return *global;
}
template <class T>
void store_l2(T* global, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  executor::check_aligned("store_l2", global, sizeof(T));
  executor::check_written("store_l2", &value, sizeof(T));
  *global = value;
}

template <class Params>
const char* most_threads(void (*)(Params), int* threads) {
  *threads = 1024;
  return nullptr;
}

template <class Params>
const char* launch(void (*kernel)(Params), const Grid& grid, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } const call{kernel, params};
  return executor::run(
      grid, [](const void* c) { static_cast<const Call*>(c)->kernel(static_cast<const Call*>(c)->params); }, &call);
}

template <class Body>
const char* with_device(int device, const Body& body) {
  return device == 0 ? body() : "invalid device ordinal";
}

}   // namespace stable_rnn
