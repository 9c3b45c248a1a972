// The product of one step, sums = weights x states, in each arithmetic: 16 rows of weights times 8 lanes at a time.
//
// Weights (rows x k) and states (lanes x k) lie with k contiguous, zeros up to a whole number of *chunks*: what is taken at once of k.
// A thread reads 16 bytes at a time (a Quad). With g = lane / 4, t = lane % 4 it ends up with
//     sums[0, 1] = row g x lanes 2t, 2t + 1,   sums[2, 3] = row g + 8 x lanes 2t, 2t + 1          (the layout of mma.m16n8)
// Tensor cores: chunks of 64 bytes. The thread holds bytes [16t, 16t + 16) of rows g and g + 8 and of lane g, which is two mma's share:
//     the instruction's order of k is a permutation of ours, the same one for weights and for states, so no sum notices. Weights are packed
//     so that one Quad is an mma's operand: rows g, g + 8, g, g + 8 of two words. (wgmma: see GroupProduct.)
// CUDA cores (float32): chunks of 16 bytes. The thread holds all of rows g and g + 8 and of lanes 2t and 2t + 1, and sums k in order.
// Sums start at zero and take the chunks in order: a lane's bits depend neither on the lanes beside it nor on where the weights are.
#pragma once
#include "approximate.cuh"
#include "device.cuh"
#include "stable_rnn/params.h"

namespace stable_rnn {

struct alignas(16) Quad {
  uint32_t word[4];
};

// What memory layouts need to know of an arithmetic; sizes in bytes.
struct ProductShape {
  int element;   // of weights and states
  int chunk;
  int pitch_unit;   // lanes lie an odd multiple of this apart in shared memory, so that the reads of a warp spread over the banks;
                    // see also place_of(), for its writes
  int fragments;   // Quads of weights that a warp reads at once; two such reads are 16 rows of a chunk
};

constexpr ProductShape product_shape(int dtype) {
  return dtype == F32 ? ProductShape{4, 16, 16, 8} : ProductShape{dtype == TF32 ? 4 : 2, 64, 64, 32};
}

template <class Tag>
struct TensorProduct {
  struct States {
    Quad lane;
  };
  using Type = Tag;
  static __device__ __forceinline__ int fragment(int lane) { return lane; }
  // Where a column of a lane's state lies. The Quads of a chunk change places from lane to lane: what eight lanes write of one column
  // spreads over all banks, and so does what two lanes read of one chunk.
  static constexpr STABLE_RNN_HD int place_of(int lane, int column) {
    return column ^ ((lane & 2) << 4 | (lane & 4) << 2);
  }
  static __device__ __forceinline__ int place(int lane, int column, int pitch) {
    return lane * pitch + place_of(lane, column);
  }
  static __device__ __forceinline__ int first_state(int lane, int pitch) {
    return place(lane / 4, lane % 4 * 16, pitch);
  }
  static __device__ __forceinline__ States states(const char* at, int) { return {*reinterpret_cast<const Quad*>(at)}; }

  static __device__ __forceinline__ void multiply(float (&sums)[4], const Quad (&weights)[2], const States& s) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t b[2] = {s.lane.word[2 * j], s.lane.word[2 * j + 1]};
      mma(sums, weights[j].word, b, Tag{});
    }
  }
  // What word `w` of fragment `f` in read j is: a row of the 16, and a word of the chunk.
  static __device__ __forceinline__ int row_of(int, int f, int w) { return f / 4 + w % 2 * 8; }
  static __device__ __forceinline__ int word_of(int j, int f, int w) { return f % 4 * 4 + 2 * j + w / 2; }
};

// The product of a warpgroup: wgmma reads the states of many lanes for four warps at once, instead of each warp for itself. The instruction's
// order of k is ours, in chunks of 16; so sums have other bits than those of mma, whose order is a permutation.
template <class A>
struct GroupProduct : A {
  // [lanes / 8][column / 16][lanes % 8][16]: the 128 bytes that the instruction takes of eight lanes, and what a warp sends, lie together.
  static constexpr int along = 128;
  static __device__ __forceinline__ int place(int lane, int column, int pitch) {
    return lane / 8 * (8 * pitch) + column / 16 * along + lane % 8 * 16 + column % 16;
  }
  static __device__ __forceinline__ int first_state(int, int) { return 0; }
  static __device__ __forceinline__ int word_of(int j, int f, int w) { return 8 * j + f % 4 + w / 2 * 4; }
};

constexpr bool places_spread() {   // those of eight lanes, over the eight Quads of all banks
  unsigned seen = 0;
  for (int lane = 0; lane < 8; ++lane) seen |= 1u << (lane * 64 + TensorProduct<Tf32Tag>::place_of(lane, 0)) / 16 % 8;
  return seen == 0xff;
}
static_assert(places_spread(), "eight lanes' Quads of one column meet in the same banks");

struct ScalarProduct {
  struct States {
    Quad lanes[2];
  };
  static __device__ __forceinline__ int fragment(int lane) { return lane / 4; }
  static constexpr STABLE_RNN_HD int place_of(int, int column) { return column; }
  static __device__ __forceinline__ int place(int lane, int column, int pitch) { return lane * pitch + column; }
  static __device__ __forceinline__ int first_state(int lane, int pitch) { return lane % 4 * 2 * pitch; }
  static __device__ __forceinline__ States states(const char* at, int pitch) {
    return {{*reinterpret_cast<const Quad*>(at), *reinterpret_cast<const Quad*>(at + pitch)}};
  }
  static __device__ __forceinline__ float as_float(uint32_t word) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  static __device__ __forceinline__ void multiply(float (&sums)[4], const Quad (&weights)[2], const States& s) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[e] = fma(as_float(weights[e / 2].word[k]), as_float(s.lanes[e % 2].word[k]), sums[e]);
  }
  static __device__ __forceinline__ int row_of(int j, int f, int) { return f + 8 * j; }
  static __device__ __forceinline__ int word_of(int, int, int w) { return w; }
};

// Storage: of tensors. Element: of weights and states in the product. Real: of the gate arithmetic.
template <int dtype> struct Arithmetic;
template <> struct Arithmetic<F32> : ScalarProduct {
  static constexpr ProductShape shape = product_shape(F32);
  using Storage = float;
  using Element = float;
  using Real = float;
  static __device__ __forceinline__ Element element(float x) { return x; }
};
template <> struct Arithmetic<TF32> : TensorProduct<Tf32Tag> {
  static constexpr ProductShape shape = product_shape(TF32);
  using Storage = float;
  using Element = uint32_t;
  using Real = float;
  static __device__ __forceinline__ Element element(float x) { return to_tf32(x); }
};
template <> struct Arithmetic<BF16> : TensorProduct<Bf16Tag> {
  static constexpr ProductShape shape = product_shape(BF16);
  using Storage = Bf16;
  using Element = Bf16;
  using Real = Approximate;
  static __device__ __forceinline__ Element element(float x) { return Bf16(x); }
};
template <> struct Arithmetic<F16> : TensorProduct<F16Tag> {
  static constexpr ProductShape shape = product_shape(F16);
  using Storage = Half;
  using Element = Half;
  using Real = Approximate;
  static __device__ __forceinline__ Element element(float x) { return Element(x); }
};

// One store; a memcpy to a char* would be one for each byte. `at` is a multiple of the element's size.
template <class A>
__device__ __forceinline__ void put_element(char* at, float x) {
  *reinterpret_cast<typename A::Element*>(at) = A::element(x);
}

constexpr int held_chunks = 8;   // the most of k that a warp's weights in registers may span: 512 bytes

// Weights of a warp in registers: `rows` blocks of 16 rows.
template <class A, int rows>
struct HeldWeights {
  Quad quads[rows][held_chunks][2];
  __device__ __forceinline__ void load(const Quad* packed, int chunks) {
#pragma unroll
    for (int m = 0; m < rows; ++m)
#pragma unroll
      for (int c = 0; c < held_chunks; ++c)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (c < chunks) quads[m][c][j] = packed[((m * chunks + c) * 2 + j) * A::shape.fragments];
  }
};

// `states`: where the thread's first lane begins. A chunk's states are read while the one before is multiplied.
template <class A, int rows>
__device__ __forceinline__ void product(float (&sums)[rows][1][4], const HeldWeights<A, rows>& weights, int chunks,
                                        const char* states, int pitch) {
  auto next = A::states(states, pitch);
#pragma unroll
  for (int c = 0; c < held_chunks; ++c) {
    if (c == chunks) break;
    const auto now = next;
    if (c + 1 < chunks) next = A::states(states + (c + 1) * A::shape.chunk, pitch);
#pragma unroll
    for (int m = 0; m < rows; ++m) A::multiply(sums[m][0], weights.quads[m][c], now);
  }
}

template <class A, int rows, int octets>
struct Chunk {
  Quad weights[rows][2];
  typename A::States states[octets];

  __device__ __forceinline__ void load(const Quad* packed, int chunks, const char* first_state, int pitch, int c) {
#pragma unroll
    for (int m = 0; m < rows; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) weights[m][j] = packed[((m * chunks + c) * 2 + j) * A::shape.fragments];
#pragma unroll
    for (int n = 0; n < octets; ++n) states[n] = A::states(first_state + n * 8 * pitch + c * A::shape.chunk, pitch);
  }
  __device__ __forceinline__ void multiply(float (&sums)[rows][octets][4]) const {
#pragma unroll
    for (int n = 0; n < octets; ++n)
#pragma unroll
      for (int m = 0; m < rows; ++m) A::multiply(sums[m][n], weights[m], states[n]);
  }
};

// `packed`: the thread's first Quad of weights, in shared or global memory, in the order [rows][chunk][2][fragment].
// With few lanes nothing else hides the time of a read, so the next chunk is read ahead; with many, registers are dear.
template <class A, int rows, int octets>
__device__ __forceinline__ void product(float (&sums)[rows][octets][4], const Quad* packed, int chunks,
                                        const char* states, int pitch) {
  if constexpr (octets <= 2) {
    Chunk<A, rows, octets> next;
    next.load(packed, chunks, states, pitch, 0);
#pragma unroll 2
    for (int c = 1; c < chunks; ++c) {
      const auto now = next;
      next.load(packed, chunks, states, pitch, c);
      now.multiply(sums);
    }
    next.multiply(sums);
  } else {
#pragma unroll 2
    for (int c = 0; c < chunks; ++c) {
      Chunk<A, rows, octets> now;
      now.load(packed, chunks, states, pitch, c);
      now.multiply(sums);
    }
  }
}

// By a warpgroup, with the arguments of the one above; `states`: where its first lane begins. The weights of a chunk are read while the one
// before is multiplied, into the registers of the last but one.
template <class A, int rows, int octets>
__device__ __forceinline__ void group_product(float (&sums)[rows][octets][4], const Quad* packed, int chunks,
                                              const char* states, int pitch) {
  Quad even[rows][2], odd[rows][2];
  const uint64_t first = wgmma_matrix(states, A::along, 8 * pitch);
  const auto load = [&](Quad(&weights)[rows][2], int c) {
#pragma unroll
    for (int m = 0; m < rows; ++m)
#pragma unroll
      for (int j = 0; j < 2; ++j) weights[m][j] = packed[((m * chunks + c) * 2 + j) * A::shape.fragments];
  };
  const auto step = [&](const Quad(&now)[rows][2], Quad(&next)[rows][2], int c) {
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int m = 0; m < rows; ++m)
        wgmma(sums[m], now[m][j].word, first + (2 * c + j) * (2 * A::along / 16), typename A::Type{});
    wgmma_commit();
    wgmma_wait<1>();
    if (c + 1 < chunks) load(next, c + 1);
  };
  load(even, 0);
  wgmma_pin(sums);
#pragma unroll 1
  for (int c = 0; c < chunks; c += 2) {
    step(even, odd, c);
    if (c + 1 < chunks) step(odd, even, c + 1);
  }
  wgmma_wait<0>();
  wgmma_pin(sums);
}

}   // namespace stable_rnn
