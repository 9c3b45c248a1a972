// W X and W^T Y for a block of 16 vectors on tensor cores, in TF32 three times: every float is split into high + low, each with TF32's 11
// bits, and high * high + high * low + low * high is within 3 * 2^-22 of the product. Weights of 16-bit types have no low part.
// The small summands have sums of their own: tensor cores round sums towards zero, and so the large sum is rounded a third as often.
//
// In shared memory the columns of a row are permuted, in quads of four, so that the reads of a warp fall into different banks, along rows
// (W X) and along columns (W^T Y) alike: 16 bytes stay 16 bytes.
#pragma once
#include "spectral_layout.h"

namespace stable_rnn {
namespace spectral {

// Row r, column j of W; pitch: a multiple of 32.
__device__ __forceinline__ int weight_at(int r, int j, int pitch) { return r * pitch + (j ^ ((r & 3) * 8 | (r & 4))); }
// Vector c at row r of a block (rows, K).
__device__ __forceinline__ int block_at(int r, int c) { return r * K + (c ^ (r & 2) * 4); }

// A row of a block.
struct Row {
  Quad quads[K / 4];
  __device__ __forceinline__ Row(const float* block, int r) {
#pragma unroll
    for (int q = 0; q < K / 4; ++q) quads[q] = reinterpret_cast<const Quad*>(block + r * K)[q ^ (r & 2)];
  }
  __device__ __forceinline__ float operator[](int c) const { return quads[c / 4].v[c % 4]; }
};

struct Split {
  uint32_t high, low;
};

__device__ __forceinline__ Split split(float x) {
  Split parts;
  float rounded;
  std::memcpy(&parts.high, &x, 4);
  parts.high = (parts.high + 0x1000) & 0xffffe000;   // to_tf32 of a finite number
  std::memcpy(&rounded, &parts.high, 4);
  rounded = x - rounded;   // exact; mma ignores what exceeds 11 bits
  std::memcpy(&parts.low, &rounded, 4);
  return parts;
}

struct Columns {   // a fragment B (8, 16) of a block
  uint32_t high[2][2], low[2][2];
  __device__ __forceinline__ Columns(const float* block, int row) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Split parts = split(block[block_at(row + lane % 4 + 4 * h, n * 8 + lane / 4)]);
        high[n][h] = parts.high;
        low[n][h] = parts.low;
      }
  }
};

struct Sums {   // of 16 rows, 16 vectors
  float large[2][4] = {}, small[2][4] = {};

  // Adds A B, `value(i)` being entry i of the lane's fragment of A. exact: A has no low part.
  template <class Value>
  __device__ __forceinline__ void add(const Value& value, const Columns& b, bool exact) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Split parts = split(value(i));
      high[i] = parts.high;
      low[i] = parts.low;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (!exact) mma(small[n], low, b.high[n], Tf32Tag{});
      mma(small[n], high, b.low[n], Tf32Tag{});
      mma(large[n], high, b.high[n], Tf32Tag{});
    }
  }

  // put(row, column, value, next): two neighbours at a time
  template <class Put>
  __device__ __forceinline__ void each(const Put& put) const {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        put(lane / 4 + 8 * h, n * 8 + lane % 4 * 2, large[n][2 * h] + small[n][2 * h],
            large[n][2 * h + 1] + small[n][2 * h + 1]);
  }
};

// One warp: part (16 * tiles, K) = rows of W, columns [first, last), times those rows of X. first, last: multiples of 8.
template <int tiles>
__device__ __forceinline__ void forward_product(const float* W, int row, int pitch, const float* X, int first, int last,
                                                bool exact, float* part) {
  const int lane = thread_index() % 32;
  Sums sums[tiles];
  for (int k = first; k < last; k += 8) {
    const Columns x(X, k);
#pragma unroll
    for (int m = 0; m < tiles; ++m)
      sums[m].add(
          [&](int i) { return W[weight_at(row + 16 * m + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4, pitch)]; }, x,
          exact);
  }
#pragma unroll
  for (int m = 0; m < tiles; ++m)
    sums[m].each([&](int r, int c, float a, float b) {
      part[(16 * m + r) * K + c] = a;
      part[(16 * m + r) * K + c + 1] = b;
    });
}

// One warp: columns [column, column + 16) of `rows` rows of W, a multiple of 8, against Y (rows, K). Z (.., K) at row `column` is set, or
// added to.
__device__ __forceinline__ void backward_product(const float* W, int rows, int pitch, const float* Y, int column,
                                                 bool exact, bool add, float* Z) {
  const int lane = thread_index() % 32;
  Sums sums;
  for (int r = 0; r < rows; r += 8)
    sums.add([&](int i) { return W[weight_at(r + lane % 4 + i / 2 * 4, column + lane / 4 + i % 2 * 8, pitch)]; },
             Columns(Y, r), exact);
  sums.each([&](int j, int c, float a, float b) {
    float* z = Z + block_at(column + j, c);
    z[0] = add ? z[0] + a : a;
    z[1] = add ? z[1] + b : b;
  });
}

}   // namespace spectral
}   // namespace stable_rnn
