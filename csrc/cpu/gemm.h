// The product behind every step: rows of states times weights, the weights packed once per call into panels of up to four vectors of
// columns. A panel's sum over k starts at zero and runs upwards in one chain of fma, whatever the number of rows: that, and nothing
// else, makes a lane's result independent of the lanes beside it, of its place in a tile and of the threads.
#pragma once
#include "simd.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

constexpr int panel_vectors = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int block_rows = 6;   // 24 accumulators of 32 registers
#else
constexpr int block_rows = 3;   // 12 of 16
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Panel p holds, for each k in turn, its vectors of weights. Four gates: vector g belongs to gate g of the `width` units from
// p * width. One gate: the vectors are consecutive columns; they are spread evenly over the panels.
struct Panels {
  int64_t k, units;   // length of the sums; columns of each gate
  int gates;
  int64_t vectors;   // of units
  int64_t count;
  float* data = nullptr;
  int not_finite = 0;

  Panels(int64_t k, int64_t units, int gates, int threads)
      : k(k), units(units), gates(gates), vectors(ceil_div(units, width)), count(vectors) {
    if (gates == 1) {   // as few panels as hold four vectors each, but some for every thread
      count = ceil_div(vectors, panel_vectors);
      const int64_t shared = round_up(count, threads);
      count = shared < vectors ? shared : vectors;
    }
  }
  int64_t floats() const { return vectors * gates * k * width; }
  int64_t first(int64_t p) const { return gates == 1 ? vectors * p / count : p; }           // vector of units
  int size(int64_t p) const { return gates == 1 ? int(first(p + 1) - first(p)) : gates; }   // vectors in the panel
  float* at(int64_t p) const { return data + first(p) * gates * k * width; }
};

// panel[j * stride + lane] = w[lane * ld + j] for lane < rows, else 0: `width` rows of w become one vector column of a panel.
// Returns zeros, or a NaN for each lane with an element that is not finite.
template <class T>
STABLE_RNN_INLINE Vec pack_transposed(const T* w, int64_t ld, int64_t rows, int64_t k, float* panel, int64_t stride) {
  Vec check[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)}, block[width];
  const auto put = [&](int64_t j, int i) {
    check[i % 4] = fma(block[i], Vec(0.f), check[i % 4]);
    store(panel + (j + i) * stride, block[i]);
  };
  int64_t j = 0;
  for (; rows >= width && j + width <= k; j += width) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) block[i] = load(w + i * ld + j);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) put(j, i);
  }
  for (; j < k; j += width) {
    for (int i = 0; i < width; ++i) block[i] = i < rows ? load(w + i * ld + j, k - j) : Vec(0.f);
    transpose(block);
    for (int i = 0; i < width && j + i < k; ++i) put(j, i);
  }
  return (check[0] + check[1]) + (check[2] + check[3]);
}

// Panel p of w (gates * units, k): column u of the product is row u of w.
template <class T>
void pack_rows(Panels& panels, int64_t p, const T* w) {
  const int size = panels.size(p);
  Vec check(0.f);
  for (int v = 0; v < size; ++v) {
    const int64_t unit = (panels.first(p) + (panels.gates == 1 ? v : 0)) * width;
    const int64_t row = (panels.gates == 1 ? 0 : v * panels.units) + unit;
    check = check + pack_transposed(w + row * panels.k, panels.k, panels.units - unit, panels.k,
                                    panels.at(p) + v * width, int64_t(size) * width);
  }
  for (int i = 0; i < width; ++i)
    if (!(check.v[i] == 0.f)) __atomic_store_n(&panels.not_finite, 1, __ATOMIC_RELAXED);
}

// Panel p of w (k, units), one gate: column u of the product is column u of w.
template <class T>
void pack_columns(Panels& panels, int64_t p, const T* w) {
  const int size = panels.size(p);
  const int64_t unit = panels.first(p) * width;
  float* to = panels.at(p);
  for (int64_t k = 0; k < panels.k; ++k)
    for (int v = 0; v < size; ++v, to += width)
      store(to, load(w + k * panels.units + unit + v * width, panels.units - unit - v * width));
}

// acc[r][v] = sum over k of a[r][k] * panel[k][v], going on from acc where `more`.
template <int rows, int vectors, bool more>
STABLE_RNN_INLINE void multiply_block(const float* a, int64_t lda, const float* panel, int64_t k, Vec* acc) {
  Vec sum[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = more ? acc[r * vectors + v] : Vec(0.f);
  for (int64_t j = 0; j < k; ++j) {
    Vec w[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) w[v] = load(panel + (j * vectors + v) * width);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const Vec x(a[r * lda + j]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) acc[r * vectors + v] = sum[r][v];
}

template <int vectors, bool more = false>
void multiply_rows(int rows, const float* a, int64_t lda, const float* panel, int64_t k, Vec* acc) {
  static_assert(block_rows <= 6, "add a case");
  switch (rows) {
    case 1:
      return multiply_block<1, vectors, more>(a, lda, panel, k, acc);
    case 2:
      return multiply_block<2, vectors, more>(a, lda, panel, k, acc);
    case 3:
      return multiply_block<3, vectors, more>(a, lda, panel, k, acc);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 4:
      return multiply_block<4, vectors, more>(a, lda, panel, k, acc);
    case 5:
      return multiply_block<5, vectors, more>(a, lda, panel, k, acc);
    case 6:
      return multiply_block<6, vectors, more>(a, lda, panel, k, acc);
#endif
  }
}

// done(row, sums) for each of n rows of a, with sums[v] the vectors of the row's product with panel p; a null a is all zeros.
template <class Done>
STABLE_RNN_INLINE void multiply(const float* a, int64_t lda, int64_t n, const Panels& panels, int64_t p,
                                const Done& done) {
  const int size = panels.size(p);
  const float* panel = panels.at(p);
  const int64_t blocks = ceil_div(n, block_rows);
  for (int64_t b = 0; b < blocks; ++b) {   // blocks as even as can be
    const int64_t row = n * b / blocks;
    const int rows = int(n * (b + 1) / blocks - row);
    Vec acc[block_rows * panel_vectors];
    if (!a) {
      for (int i = 0; i < rows * size; ++i) acc[i] = Vec(0.f);
    } else {
      const float* block = a + row * lda;
      if (size == 4) multiply_rows<4>(rows, block, lda, panel, panels.k, acc);
      else if (size == 3) multiply_rows<3>(rows, block, lda, panel, panels.k, acc);
      else if (size == 2) multiply_rows<2>(rows, block, lda, panel, panels.k, acc);
      else multiply_rows<1>(rows, block, lda, panel, panels.k, acc);
    }
    for (int r = 0; r < rows; ++r) done(row + r, acc + r * size);
  }
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
