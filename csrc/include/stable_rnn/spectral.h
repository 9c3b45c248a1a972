// One uncertified step of the spectral projection for many matrices: block power iteration, Rayleigh-Ritz, clip or scale.
// The mathematics is in stable_rnn/ops/spectral/README.md.
#pragma once
#include <cstdint>

namespace stable_rnn {

constexpr int SPECTRAL_BLOCK = 16;   // most vectors in a block

struct SpectralMatrix {
  int64_t dtype;        // DType of params.h
  int64_t rows, cols;   // m, n
  int64_t stride;       // elements between rows; a row is contiguous
  int64_t width;        // k <= SPECTRAL_BLOCK: vectors in the block
  int64_t w;            // address of W, [m, n] read and, where the matrix is outside, written
  int64_t block;        // address of the block, [n, k] float, read and written
};

struct SpectralParams {
  int threads;
  int scale;        // 0: clip singular values, 1: scale the matrix
  int iterations;   // applications of W^T W to the block
  int64_t fresh;    // so many last vectors of each block are drawn anew
  uint64_t seed;    // matrix i draws from seed + i
  int64_t count;
  const SpectralMatrix* matrices;   // [count]
  const double* bounds;             // [count]
  double* norms;   // [count] estimates of the norms afterwards; NaN where W is not finite, and then nothing is written
  int64_t* near;   // [count] singular values of the block that were above 0.999 of the bound
};

// Repeats bitwise, for any number of threads. Returns null, or a message with static lifetime.
const char* spectral_step_cpu(const SpectralParams&);

}   // namespace stable_rnn
