// Small kernels over the primitives of device.cuh, for tests/test_executor.py; also compiled for a GPU, where there is one.
#include "device.cuh"

namespace stable_rnn {
namespace {

struct Params {
  const void* in;
  const void* more;
  const void* init;
  void* out;
  unsigned* flags;
  int count, mode;
};

template <class T>
__device__ __forceinline__ T* shared_as(int offset_bytes = 0) {
  return reinterpret_cast<T*>(shared_memory() + offset_bytes);
}

__device__ __forceinline__ int global_thread() { return block_index() * thread_count() + thread_index(); }

// out [blocks * threads, 6]: where each thread believes to be
__global__ void where(const Params p) {
  int* out = static_cast<int*>(p.out) + 6 * int64_t(global_thread());
  out[0] = thread_index();
  out[1] = thread_count();
  out[2] = block_index();
  out[3] = block_count();
  out[4] = cluster_rank();
  out[5] = cluster_size();
}

// out[i] = in[source[i]] within each warp; mode 1: of doubles; 2: in[i ^ count]
__global__ void shuffles(const Params p) {
  const int i = global_thread(), source = static_cast<const int*>(p.more)[i];
  if (p.mode == 1) static_cast<double*>(p.out)[i] = shuffle(static_cast<const double*>(p.in)[i], source);
  else
    static_cast<float*>(p.out)[i] = p.mode == 2 ? shuffle_xor(static_cast<const float*>(p.in)[i], p.count)
                                                : shuffle(static_cast<const float*>(p.in)[i], source);
}

// One warp: in [32, 4] and more [32, 2] registers, init and out [32, 4] sums; mode: DType. `count` products in a row.
__global__ void products(const Params p) {
  const int lane = thread_index();
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = static_cast<const uint32_t*>(p.in)[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = static_cast<const uint32_t*>(p.more)[2 * lane + i];
  for (int i = 0; i < 4; ++i) c[i] = static_cast<const float*>(p.init)[4 * lane + i];
  for (int i = 0; i < p.count; ++i) {
    if (p.mode == 1) mma(c, a, b, Bf16Tag{});
    if (p.mode == 2) mma(c, a, b, F16Tag{});
    if (p.mode == 3) mma(c, a, b, Tf32Tag{});
  }
  for (int i = 0; i < 4; ++i) static_cast<float*>(p.out)[4 * lane + i] = c[i];
}

// One warp: in [4 * 8, 8] 16-bit values, four matrices by rows, out [32, 4] words; mode 1: misaligned; 2: outside shared memory; 3: not all
// lanes take part
__global__ void transposed(const Params p) {
  const int lane = thread_index();
  uint16_t* shared = shared_as<uint16_t>();
  for (int i = lane; i < 4 * 64; i += 32) shared[i] = static_cast<const uint16_t*>(p.in)[i];
  warp_sync();
  uint32_t words[4] = {};
  if (p.mode != 3 || lane) load_transposed(words, shared + 8 * lane + (p.mode == 1 ? 4 : p.mode == 2 ? 8 : 0));
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(p.out)[4 * lane + i] = words[i];
}

// in -> out, count floats; mode 1: to Bf16 and back, 2: to Half and back, 3: to TF32
__global__ void conversions(const Params p) {
  for (int i = global_thread(); i < p.count; i += block_count() * thread_count()) {
    const float x = static_cast<const float*>(p.in)[i];
    uint32_t bits = 0;
    if (p.mode == 1) bits = Bf16(x).bits;
    if (p.mode == 2) bits = Half(x).bits;
    if (p.mode == 3) bits = to_tf32(x);
    static_cast<uint32_t*>(p.out)[i] = bits;
    Bf16 bf16;
    Half half;
    bf16.bits = half.bits = static_cast<uint16_t>(bits);
    if (p.mode != 3) static_cast<float*>(p.out)[p.count + i] = p.mode == 1 ? float(bf16) : float(half);
  }
}

// Each thread writes its number; one in another warp reads it. mode 1 forgets the barrier, 2 the second one, which lets a fast warp
// overwrite what a slow one has yet to read; 3, 4: as 1, where all read from the warp above, below, the last one from itself
__global__ void neighbours(const Params p) {
  int* shared = shared_as<int>();
  const int i = thread_index(), n = thread_count();
  const int other = p.mode == 3 ? (i + 32 < n ? i + 32 : i) : p.mode == 4 ? (i < 32 ? i : i - 32) : (i + 32) % n;
  for (int step = 0; step < p.count; ++step) {
    shared[i] = 1000 * step + i;
    if (p.mode == 0 || p.mode == 2) block_sync();
    static_cast<int*>(p.out)[int64_t(step) * n + i] = shared[other];
    if (p.mode != 2) block_sync();
  }
}

// out: what a thread finds at its copies' destinations before waiting, after waiting for all but one group, and after all.
// mode 1: a misaligned source; 2: outside shared memory; 3, 4: source, destination written under way
__global__ void copies(const Params p) {
  const int i = thread_index(), n = thread_count();
  float* shared = shared_as<float>();
  float* out = static_cast<float*>(p.out);
  const float* in = static_cast<const float*>(p.in);
  for (int j = i; j < 5 * n; j += n) shared[j] = 1.f;
  block_sync();
  copy_async<4>(shared + i, in + i);
  copy_commit();
  if (p.mode == 1) copy_async<8>(shared + 4 * n, in + 1);
  copy_async<16>(shared + n + 4 * i + (p.mode == 2 ? 4 * n : 0), in + n + 4 * i);
  copy_commit();
  if (p.mode == 3) const_cast<float*>(in)[i] = -1.f;
  if (p.mode == 4) shared[i] = -1.f;
  if (p.mode == 5) out[i] = shared[i], out[n + i] = shared[n + 4 * i];   // too early
  copy_wait<1>();
  out[2 * n + i] = shared[i];
  if (p.mode == 5) out[3 * n + i] = shared[n + 4 * i];   // too early
  copy_wait<0>();
  block_sync();
  for (int j = 0; j < 5; ++j) out[4 * n + j * n + i] = shared[j * n + i];
}

// Each block sends its number to all others of its cluster; out [blocks, cluster]. mode 1: sends before the others have begun;
// 2: reads from blocks that may have ended; 3: arrives twice; 4: waits without arriving; 5: an address that is not shared memory
__global__ void cluster_exchange(const Params p) {
  const int rank = cluster_rank(), size = cluster_size(), i = thread_index();
  int* shared = shared_as<int>();
  int* out = static_cast<int*>(p.out) + int64_t(block_index()) * size;
  if (p.mode == 3) cluster_arrive();
  if (p.mode == 4) cluster_wait();
  if (p.mode != 1) cluster_sync();
  if (i < size) cluster_map(p.mode == 5 ? out : shared, i)[rank] = 10 * block_index();
  cluster_arrive();
  int own = i < size ? shared[rank] : 0;   // another place of the source while the barrier is under way
  cluster_wait();
  if (i < size) out[i] = shared[i];
  if (p.mode == 2) {
    if (i < size) out[i] = *cluster_map(shared + i, (rank + 1) % size) + 0 * own;
    return;
  }
  cluster_sync();
}

struct alignas(16) Numbers {
  int v[4];
};

// `count` steps of a cluster that meets by transactions: each warp sends one Numbers to every block, made from those of all warps of the
// step before. out [blocks, warps, count]. mode 1: no wait; 2, 3: 16 bytes too few, too many are expected; 4: the barriers have not begun;
// 5: one buffer for all steps; 6: the other parity; 7: a block ends before its last step has come; 8: outside shared memory; 9: one warp
// arrives twice; 10: misaligned; 11: a barrier is written over; 12: two warps send to one place; 13: one warp does not arrive;
// 14: a phase is left out
__global__ void transactions(const Params p) {
  const int size = cluster_size(), rank = cluster_rank(), warps = thread_count() / 32, senders = size * warps;
  const int lane = thread_index() % 32, warp = thread_index() / 32, sender = rank * warps + warp;
  uint64_t* barriers = shared_as<uint64_t>();
  Numbers* states = shared_as<Numbers>(16);   // [2][senders]
  int* out = static_cast<int*>(p.out) + (int64_t(block_index()) * warps + warp) * p.count;
  for (int i = thread_index(); i < senders; i += thread_count()) states[i] = {{i, 0, 0, 0}};
  if (thread_index() < 2 && p.mode != 4) transactions_begin(barriers + thread_index(), warps);
  cluster_sync();
  for (int t = 0; t < p.count; ++t) {
    const Numbers* now = states + t % 2 * senders;
    Numbers* next = states + (p.mode == 5 ? t : t + 1) % 2 * senders;
    int sum = 7 * sender;
    for (int i = 0; i < senders; ++i) sum += now[i].v[0] + 3 * now[i].v[3];
    warp_sync();
    next += p.mode == 8 ? 2 * senders : p.mode == 12 ? 0 : sender;
    if (p.mode == 10) next = reinterpret_cast<Numbers*>(reinterpret_cast<char*>(next) - 8);
    if (p.mode == 11 && thread_index() == 0) barriers[0] = 0;
    if (lane < size) store_async(next, Numbers{{sum % 1000, 0, 0, sum % 7}}, barriers + t % 2, (rank + lane) % size);
    warp_sync();
    const int bytes = warp ? 0 : 16 * (senders - (p.mode == 2) + (p.mode == 3));
    if (lane == 0 && !(p.mode == 13 && warp)) transactions_arrive(barriers + t % 2, bytes);
    if (lane == 0 && warp == 0 && p.mode == 9) transactions_arrive(barriers + t % 2, 0);
    if (lane == 0) out[t] = sum;
    if (p.mode == 1 || (p.mode == 7 && t + 1 == p.count) || (p.mode == 14 && t == 2)) continue;
    transactions_wait(barriers + t % 2, (t / 2 + (p.mode == 6)) % 2);
  }
}

// One warpgroup: in [128, count, 4] registers, more [32, 16 count] values of 16 bits by columns, init and out [128, 4, 4] sums. mode: DType;
// 3: no wgmma_fence; 5: no proxy_fence; 6: that comes before the stores; 7: misaligned; 8: outside shared memory; 9: one warp
// takes other columns; 10, 11, 12: a, d, b written before the wait; 13: d used before the wait; 14: ends before the wait
__global__ void warpgroups(const Params p) {
  const int i = thread_index(), n = thread_count(), depth = 16 * p.count, across = 16 * depth;
  uint16_t* b = shared_as<uint16_t>();   // [4][2 count][8][8]
  const auto store = [&](uint16_t differs) {
    if (p.mode == 6) proxy_fence();
    for (int e = i; e < 32 * depth; e += n) {
      const int column = e / depth, k = e % depth;
      b[(column / 8 * (2 * p.count) + k / 8) * 64 + column % 8 * 8 + k % 8] =
          static_cast<const uint16_t*>(p.more)[e] ^ differs;
    }
    if (p.mode != 5 && p.mode != 6) proxy_fence();
    block_sync();
  };
  uint32_t a[2][4];
  float sums[1][4][4];
  auto& d = sums[0];
  for (int e = 0; e < 16; ++e) d[e / 4][e % 4] = static_cast<const float*>(p.init)[16 * i + e];
  store(0);
  wgmma_pin(sums);
  const auto* words = static_cast<const uint32_t*>(p.in) + 4 * p.count * i;
  const int skip = p.mode == 7 ? 4 : p.mode == 8 ? 64 : p.mode == 9 && i >= 96 ? 32 : 0;   // of values
  const uint64_t first = wgmma_matrix(b + skip, 128, across);
  for (int k = 0; k < p.count; ++k) {
    uint32_t (&now)[4] = a[k % 2];
    for (int e = 0; e < 4; ++e) now[e] = words[4 * k + e];
    if (p.mode != 3) wgmma_fence();
    if (p.mode == 2) wgmma(d, now, first + 16 * k, F16Tag{});
    else wgmma(d, now, first + 16 * k, Bf16Tag{});
    wgmma_commit();
    if (p.mode == 10) now[0] ^= 0x8000;
    if (p.mode == 11) d[0][0] = 0;
    if (k + 1 < p.count) wgmma_wait<1>();
  }
  if (p.mode == 12) store(0x8000);
  if (p.mode == 13 || p.mode == 14)
    for (int e = 0; e < 16; ++e) static_cast<float*>(p.out)[16 * i + e] = d[e / 4][e % 4];
  if (p.mode == 14) return;
  wgmma_wait<0>();
  if (p.mode == 13) return;
  wgmma_pin(sums);
  for (int e = 0; e < 16; ++e) static_cast<float*>(p.out)[16 * i + e] = d[e / 4][e % 4];
}

// A token goes round the blocks of a cooperative grid `count` times; each adds one. mode 1: waits for what never comes.
__global__ void token(const Params p) {
  const int block = block_index(), blocks = block_count();
  int* value = static_cast<int*>(p.out);
  for (int round = 0; round < p.count; ++round) {
    if (thread_index() == 0) flag_wait(p.flags + block, round + 1 + p.mode);
    block_sync();
    const int seen = load_l2(value);
    block_sync();
    if (thread_index() == 0) {
      store_l2(value, seen + 1);
      flag_signal(p.flags + (block + 1) % blocks, round + 1 + (block + 1 == blocks));
    }
  }
}

struct alignas(8) Two {
  float v[2];
};
struct alignas(16) Four {
  float v[4];
};

// Through L2 by 4, 8 and 16 bytes; mode 1: misaligned
__global__ void through_l2(const Params p) {
  const int i = thread_index(), n = thread_count();
  const float* in = static_cast<const float*>(p.in);
  float* out = static_cast<float*>(p.out);
  store_l2(out + i, load_l2(in + i));
  store_l2(reinterpret_cast<Two*>(out + n) + i, load_l2(reinterpret_cast<const Two*>(in + n + p.mode) + i));
  store_l2(reinterpret_cast<Four*>(out + 3 * n) + i, load_l2(reinterpret_cast<const Four*>(in + 3 * n) + i));
}

// Faults: 0: one thread misses the barrier; 1: a warp in two collectives; 2: a write just past shared memory; 3: shared memory as found;
// 4: a read `count` floats further; 5: a vector at an address that it may not have; 6, 7: shared memory as
// found, one float and a part of four, on its way to other blocks
__global__ void faults(const Params p) {
  const int i = thread_index();
  float* shared = shared_as<float>();
  float* out = static_cast<float*>(p.out);
  if (p.mode == 0 && i != 5) block_sync();
  if (p.mode == 1) out[i] = i % 2 ? shuffle(1.f, 0) : shuffle_xor(1.f, 1);
  if (p.mode == 2) shared[i + 1] = 1.f;
  if (p.mode == 3) out[i] = shared[i];
  if (p.mode == 4) out[i] = static_cast<const float*>(p.in)[i + p.count];
  if (p.mode == 5) out[i] = shared_as<const Two>(4)->v[1];
  if (p.mode == 6) store_l2(out + i, shared[i]);
  if (p.mode == 7) {
    for (int k = 0; k < 3; ++k) shared[4 * i + k] = 1.f;
    store_l2(reinterpret_cast<Four*>(out) + i, shared_as<Four>()[i]);
  }
}

// h' = tanh-like(W h + x), hidden units split over the blocks of a team that meet in a cluster (mode 0) or through L2 (mode 1).
// W [H, H], x [count, H], out [count, H]; one thread a unit.
__global__ void recurrence(const Params p) {
  const int threads = thread_count(), hidden = block_count() * threads, unit = global_thread();
  const float* w = static_cast<const float*>(p.in) + int64_t(unit) * hidden;
  float* out = static_cast<float*>(p.out);
  for (int i = thread_index(); i < 2 * hidden; i += threads) shared_as<float>()[i] = 0.f;
  block_sync();
  if (p.mode == 0) cluster_sync();
  for (int t = 0; t < p.count; ++t) {
    const float* h = shared_as<float>() + t % 2 * hidden;
    float* next = shared_as<float>() + (t + 1) % 2 * hidden;
    float sum = static_cast<const float*>(p.more)[int64_t(t) * hidden + unit];
    for (int k = 0; k < hidden; ++k) sum = fma(w[k], h[k], sum);
    const float value = sum / (1.f + (sum < 0.f ? -sum : sum));
    store_l2(out + int64_t(t) * hidden + unit, value);
    if (p.mode == 0) {
      for (int rank = 0; rank < cluster_size(); ++rank) cluster_map(next, rank)[unit] = value;
      cluster_sync();
    } else {
      block_sync();
      if (thread_index() == 0) flag_signal(p.flags + block_index(), t + 1);
      if (thread_index() < block_count()) flag_wait(p.flags + thread_index(), t + 1);
      block_sync();
      for (int i = thread_index(); i < hidden; i += threads) next[i] = load_l2(out + int64_t(t) * hidden + i);
      block_sync();
    }
  }
}

struct Entry {
  const char* name;
  void (*kernel)(Params);
};
constexpr Entry kernels[] = {{"where", where},
                             {"shuffles", shuffles},
                             {"products", products},
                             {"transposed", transposed},
                             {"conversions", conversions},
                             {"neighbours", neighbours},
                             {"copies", copies},
                             {"cluster_exchange", cluster_exchange},
                             {"transactions", transactions},
                             {"warpgroups", warpgroups},
                             {"token", token},
                             {"through_l2", through_l2},
                             {"faults", faults},
                             {"recurrence", recurrence}};

}   // namespace

extern "C" __attribute__((visibility("default"))) const char* run_kernel(const char* name, int blocks, int threads,
                                                                         int cluster, int64_t shared_bytes,
                                                                         int cooperative, void* stream, const void* in,
                                                                         const void* more, const void* init, void* out,
                                                                         unsigned* flags, int count, int mode) {
  for (const Entry& entry : kernels)
    if (std::strcmp(entry.name, name) == 0)
      return with_device(0, [&] {
        return launch(entry.kernel, Grid{blocks, threads, cluster, shared_bytes, cooperative != 0, stream},
                      Params{in, more, init, out, flags, count, mode});
      });
  return "no such kernel";
}

}   // namespace stable_rnn
