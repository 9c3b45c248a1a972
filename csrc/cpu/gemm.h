// The product behind every step: rows of states times weights, the weights packed once per call into panels of up to four vectors of
// columns. A panel's sum over k starts at zero and runs upwards in one chain of fma, whatever the number of rows: that, and nothing
// else, makes a lane's result independent of the lanes beside it, of its place in a tile and of the threads.
//
// Weights are float, or bfloat16, which are half the bytes: pairs of consecutive k lie in one word. States of float take them widened,
// term by term, so that the sums are bit by bit those of the same weights as float; states of bfloat16 (`StateOf`) take a pair at once.
#pragma once
#include "amx.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

constexpr int panel_vectors = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int block_rows = 6;   // 24 accumulators of 32 registers
#else
constexpr int block_rows = 3;   // 12 of 16
#endif

// Rows that have registers for panels of twice as many vectors of bfloat16. The sums of one or two rows wait for each other otherwise.
constexpr int few_rows = block_rows / 3;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <bool narrow>
struct Element {
  using Type = float;
};
template <>
struct Element<true> {
  using Type = bf16;
};
// What a state in storage T is kept as between steps, where its weights are in storage T too.
template <class T>
using StateOf = typename Element<sizeof(T) == 2 && multiplies_bf16>::Type;

template <class W>
constexpr int terms = sizeof(float) / sizeof(W);   // of a sum, whose weights share a word
template <class W>   // of k weights of a column; tiles take them whole, zeros behind the last
constexpr int64_t words_of(int64_t k) {
  return ceil_div(round_up(k, has_tiles && !std::is_same<W, float>::value ? amx_k : 1), terms<W>);
}
template <class S, class W>   // rows of a product that are computed together
constexpr int rows_at_once = in_tiles<S, W>          ? amx_rows
                             : sizeof(S) > sizeof(W) ? block_rows - 1   // widened weights need registers too
                                                     : block_rows;

// Panel p holds, for each word of k in turn, its vectors of weights: for each of its vectors of units, one of each gate. Panels have up to
// four vectors, of bfloat16 for few rows eight; units are spread evenly over them.
template <class W>
struct Panels {
  int64_t k, units;   // length of the sums; columns of each gate
  int gates;
  int64_t vectors;   // of units
  int64_t count;
  float* data = nullptr;   // words
  int not_finite = 0;

  Panels(int64_t k, int64_t units, int gates, int threads, bool few = false)
      : k(k), units(units), gates(gates), vectors(ceil_div(units, width)) {
    const int most = (few ? terms<W> : 1) * panel_vectors / gates;
    count = ceil_div(vectors, most);   // as few panels as can be, but some for every thread
    const int64_t shared = round_up(count, threads);
    count = shared < vectors ? shared : vectors;
  }
  int64_t stride() const { return gates * words_of<W>(k) * width; }   // words of a vector of units
  int64_t words() const { return vectors * stride(); }
  int64_t first(int64_t p) const { return vectors * p / count; }               // vector of units
  int size(int64_t p) const { return int(first(p + 1) - first(p)) * gates; }   // vectors in the panel
  float* at(int64_t p) const { return data + first(p) * stride(); }
};

// panel[j * stride + lane] = word j of w[lane * ld ...] for lane < rows, else 0: `width` rows of w become one vector column of a panel.
// Returns zeros, or a NaN for each lane with an element that is not finite.
template <class W, class T>
STABLE_RNN_INLINE Vec pack_transposed(const T* w, int64_t ld, int64_t rows, int64_t k, float* panel, int64_t stride) {
  Vec check[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)}, block[width];
  const auto put = [&](int64_t j, int i) {
    if constexpr (terms<W> == 2) check[i % 4] = fma(even(block[i]), Vec(0.f), check[i % 4]);
    check[i % 4] = fma(terms<W> == 2 ? odd(block[i]) : block[i], Vec(0.f), check[i % 4]);
    store(panel + (j + i) * stride, block[i]);
  };
  const int64_t words = words_of<W>(k);
  int64_t j = 0;
  for (; rows >= width && (j + width) * terms<W> <= k; j += width) {
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) block[i] = load_words<W>(w + i * ld + j * terms<W>, width * terms<W>);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) put(j, i);
  }
  for (; j < words; j += width) {
    for (int i = 0; i < width; ++i)
      block[i] = i < rows ? load_words<W>(w + i * ld + j * terms<W>, k - j * terms<W>) : Vec(0.f);
    transpose(block);
    for (int i = 0; i < width && j + i < words; ++i) put(j, i);
  }
  return (check[0] + check[1]) + (check[2] + check[3]);
}

// Panel p of w (gates * units, k): column u of the product is row u of w.
template <class W, class T>
void pack_rows(Panels<W>& panels, int64_t p, const T* w) {
  const int size = panels.size(p);
  Vec check(0.f);
  for (int v = 0; v < size; ++v) {
    const int64_t unit = (panels.first(p) + v / panels.gates) * width;
    const int64_t row = v % panels.gates * panels.units + unit;
    const auto pack = [&](auto kind, int64_t place, int64_t vectors) {
      return pack_transposed<decltype(kind)>(w + row * panels.k, panels.k, panels.units - unit, panels.k,
                                             panels.at(p) + place * width, vectors * width);
    };
    if constexpr (is_split<W>) check = check + pack(bf16(), v, 2 * size) + pack(Remainder(), size + v, 2 * size);
    else check = check + pack(W(), v, size);
  }
  for (int i = 0; i < width; ++i)
    if (!(check.v[i] == 0.f)) __atomic_store_n(&panels.not_finite, 1, __ATOMIC_RELAXED);
}

// Panel p of w (k, units), one gate: column u of the product is column u of w.
template <class W, class T>
void pack_columns(Panels<W>& panels, int64_t p, const T* w) {
  const int size = panels.size(p);
  const int64_t unit = panels.first(p) * width;
  float* to = panels.at(p);
  for (int64_t k = 0; k < panels.k; k += terms<W>)
    for (int v = 0; v < size; ++v, to += width) {
      const T* from = w + k * panels.units + unit + v * width;
      const int64_t n = panels.units - unit - v * width;
      const Vec first = load(from, n);
      if constexpr (terms<W> == 1) store(to, first);
      else store(to, pairs(first, k + 1 < panels.k ? load(from + panels.units, n) : Vec(0.f)));
    }
}

// sum[r][v] += the products of n terms of each row, from a[r] on, with the panel's words of them; n <= terms<W>.
template <class W, int n, int rows, int vectors, class S>
STABLE_RNN_INLINE void add_terms(const S* a, int64_t lda, const float* words, Vec (&sum)[rows][vectors]) {
  constexpr bool both = sizeof(S) == 2;   // terms of a word at once
#pragma GCC unroll 2
  for (int i = 0; i < (both ? 1 : n); ++i) {
    if (i) asm("" : "+r"(words));   // read again: registers are full of sums
    Vec w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      w[v] = load(words + v * width);
      if (!both && terms<W> == 2) w[v] = i ? odd(w[v]) : even(w[v]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const Vec x = broadcast(a + r * lda + i, n);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        if constexpr (both) sum[r][v] = add_products(x, w[v], sum[r][v]);
        else sum[r][v] = fma(x, w[v], sum[r][v]);
      }
    }
  }
}

// acc[r][v] = sum over k of a[r][k] * panel[k][v], going on from acc where `more`.
template <class W, int rows, int vectors, bool more, class S>
STABLE_RNN_INLINE void multiply_block(const S* a, int64_t lda, const float* panel, int64_t k, Vec* acc) {
  Vec sum[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = more ? acc[r * vectors + v] : Vec(0.f);
  int64_t j = 0;
  for (; j + terms<W> <= k; j += terms<W>, panel += vectors * width) add_terms<W, terms<W>>(a + j, lda, panel, sum);
  if (j < k) add_terms<W, 1>(a + j, lda, panel, sum);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[r * vectors + v] = sum[r][v];
}

template <class W, int vectors, bool more = false, class S>
void multiply_rows(int rows, const S* a, int64_t lda, const float* panel, int64_t k, Vec* acc) {
  static_assert(block_rows <= 6, "add a case");
  if constexpr (in_tiles<S, W>) {
    constexpr int most = panel_vectors, first = vectors < most ? vectors : most;
    multiply_in_tiles<W, first, more>(rows, a, lda, panel, k, vectors, acc);
    if constexpr (vectors > most)
      multiply_in_tiles<W, vectors - most, more>(rows, a, lda, panel + most * width, k, vectors, acc + most);
  } else {
    if (rows == 1) return multiply_block<W, 1, vectors, more>(a, lda, panel, k, acc);
    if constexpr (vectors <= panel_vectors || few_rows > 1)
      if (rows == 2) return multiply_block<W, 2, vectors, more>(a, lda, panel, k, acc);
    if constexpr (vectors <= panel_vectors) {
      if (rows == 3) return multiply_block<W, 3, vectors, more>(a, lda, panel, k, acc);
      if constexpr (block_rows > 3) {
        if (rows == 4) return multiply_block<W, 4, vectors, more>(a, lda, panel, k, acc);
        if (rows == 5) return multiply_block<W, 5, vectors, more>(a, lda, panel, k, acc);
        if (rows == 6) return multiply_block<W, 6, vectors, more>(a, lda, panel, k, acc);
      }
    }
  }
}

// The same with a panel of `size` vectors.
template <class W, bool more = false, int vectors = terms<W> * panel_vectors, class S>
void multiply_panel(int size, int rows, const S* a, int64_t lda, const float* panel, int64_t k, Vec* acc) {
  if (size == vectors) return multiply_rows<W, vectors, more>(rows, a, lda, panel, k, acc);
  if constexpr (vectors > 1) multiply_panel<W, more, vectors - 1>(size, rows, a, lda, panel, k, acc);
}

// done(row, sums) for each of n rows of a, with sums[v] the vectors of the row's product with panel p; a null a is all zeros.
template <class S, class W, class Done>
STABLE_RNN_INLINE void multiply(const S* a, int64_t lda, int64_t n, const Panels<W>& panels, int64_t p,
                                const Done& done) {
  constexpr int most = rows_at_once<S, W>;
  const int size = panels.size(p);
  const float* panel = panels.at(p);
  const int64_t blocks = ceil_div(n, size > panel_vectors && !in_tiles<S, W> ? few_rows : most);
  const auto first = [&](int64_t b) {   // blocks as even as can be; tiles as full, as other shapes are to be set anew
    return !in_tiles<S, W> ? n * b / blocks : b * most < n ? b * most : n;
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = first(b);
    const int rows = int(first(b + 1) - row);
    Vec acc[most * panel_vectors];
    if (!a)
      for (int i = 0; i < rows * size; ++i) acc[i] = Vec(0.f);
    else multiply_panel<W>(size, rows, a + row * lda, lda, panel, panels.k, acc);
    for (int r = 0; r < rows; ++r) done(row + r, acc + r * size);
  }
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
