// Vec: `width` floats of the instruction set that this translation unit is compiled for, by GCC/Clang vector extensions.
// Loads and stores of the two storage types, whole or the first n elements; NaN passes through every operation.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "isa.h"

#define STABLE_RNN_INLINE inline __attribute__((always_inline))

namespace stable_rnn {
namespace STABLE_RNN_NS {

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

struct bf16 {
  uint16_t bits;
};
struct Remainder : bf16 {};   // what rounding to bfloat16 leaves of a float, rounded likewise

#ifndef STABLE_RNN_TILES
#define STABLE_RNN_TILES 0
#endif
constexpr bool has_tiles = STABLE_RNN_TILES;   // amx.h
#if defined(__AVX512BF16__)
constexpr bool multiplies_bf16 = true;   // sums of products of bfloat16 in float32, two terms at a time
#else
constexpr bool multiplies_bf16 = has_tiles;
#endif

struct Vec {
  typedef float Floats __attribute__((vector_size(width * 4)));
  typedef int32_t Ints __attribute__((vector_size(width * 4)));
  typedef uint16_t Halves __attribute__((vector_size(width * 2)));
  Floats v;

  Vec() = default;
  STABLE_RNN_INLINE Vec(Floats x) : v(x) {}
  STABLE_RNN_INLINE explicit Vec(float x) : v(x - Floats{}) {}   // x - 0 keeps the sign of zero
};

STABLE_RNN_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
STABLE_RNN_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
STABLE_RNN_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
STABLE_RNN_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }

// a * b + c, rounded once where the machine can (x86 before 2013 cannot).
STABLE_RNN_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a.v, b.v, c.v);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a.v, b.v, c.v);
#elif defined(__aarch64__)
  return vfmaq_f32(c.v, a.v, b.v);
#else
  return a.v * b.v + c.v;
#endif
}

// A NaN in x stays: x86's max and min return their second operand then.
STABLE_RNN_INLINE Vec at_least(Vec x, Vec low) {
#if defined(__AVX512F__)
  return _mm512_mask_max_ps(x.v, -1, low.v, x.v);   // the plain form makes GCC 12 warn about its own header
#elif defined(__AVX2__)
  return _mm256_max_ps(low.v, x.v);
#else
  return x.v < low.v ? low.v : x.v;
#endif
}
STABLE_RNN_INLINE Vec at_most(Vec x, Vec high) {
#if defined(__AVX512F__)
  return _mm512_mask_min_ps(x.v, -1, high.v, x.v);
#elif defined(__AVX2__)
  return _mm256_min_ps(high.v, x.v);
#else
  return high.v < x.v ? high.v : x.v;
#endif
}
STABLE_RNN_INLINE Vec select_le(Vec a, Vec b, Vec yes, Vec no) { return a.v <= b.v ? yes.v : no.v; }

STABLE_RNN_INLINE Vec power_of_two(Vec t) { return (Vec::Floats)((Vec::Ints)t.v << 23); }   // see cell.h

STABLE_RNN_INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x.v, p, sizeof x.v);
  return x;
}
STABLE_RNN_INLINE void store(float* p, Vec x) { std::memcpy(p, &x.v, sizeof x.v); }

STABLE_RNN_INLINE Vec::Ints extended(Vec::Halves h) {
#if defined(__AVX512F__)
  return (Vec::Ints)_mm512_maskz_cvtepu16_epi32(-1, (__m256i)h);   // GCC 12 makes four instructions of the other form
#else
  return __builtin_convertvector(h, Vec::Ints);
#endif
}
STABLE_RNN_INLINE Vec widen(Vec::Halves h) { return (Vec::Floats)(extended(h) << 16); }
STABLE_RNN_INLINE Vec::Halves narrow(Vec x) {   // to nearest, ties to even; a NaN stays one
#if defined(__AVX512BF16__)
  return (Vec::Halves)_mm512_cvtneps_pbh(x.v);   // which flushes denormal numbers to zero, as the products do
#else
  const Vec::Ints bits = (Vec::Ints)x.v;
  const Vec::Ints nearest = bits + 0x7fff + ((bits >> 16) & 1);
  const Vec::Ints kept = x.v == x.v ? nearest : bits | 0x400000;
  return __builtin_convertvector(kept >> 16, Vec::Halves);
#endif
}

STABLE_RNN_INLINE Vec load(const bf16* p) {
  Vec::Halves h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}
STABLE_RNN_INLINE void store(bf16* p, Vec x) {
  const Vec::Halves h = narrow(x);
  std::memcpy(p, &h, sizeof h);
}

// The first n of them (n <= 0: none); the rest reads as zero and is not touched in memory.
template <class T>
STABLE_RNN_INLINE Vec load(const T* p, int64_t n) {
  if (n >= width) return load(p);
#if defined(__AVX512F__)
  const uint32_t mask = n <= 0 ? 0 : (1u << n) - 1;
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(mask, p);
  else return widen((Vec::Halves)_mm256_maskz_loadu_epi16(mask, p));
#else
  T part[width] = {};
  for (int64_t k = 0; k < n; ++k) part[k] = p[k];
  return load(part);
#endif
}
template <class T>
STABLE_RNN_INLINE void store(T* p, Vec x, int64_t n) {
  if (n >= width) return store(p, x);
#if defined(__AVX512F__)
  const uint32_t mask = n <= 0 ? 0 : (1u << n) - 1;
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, mask, x.v);
  else _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(x));
#else
  T part[width];
  store(part, x);
  for (int64_t k = 0; k < n; ++k) p[k] = part[k];
#endif
}

// A word: 32 bits that are a float, or two bfloat16 of consecutive k, the even one below.
STABLE_RNN_INLINE Vec even(Vec words) { return (Vec::Floats)((Vec::Ints)words.v << 16); }
STABLE_RNN_INLINE Vec odd(Vec words) { return (Vec::Floats)((Vec::Ints)words.v & -0x10000); }
STABLE_RNN_INLINE Vec pairs(Vec even, Vec odd) {
  return (Vec::Floats)(extended(narrow(even)) | extended(narrow(odd)) << 16);
}

STABLE_RNN_INLINE Vec remainder(Vec x) {
  const Vec rest = x - widen(narrow(x));
  return rest.v == rest.v ? rest.v : Vec::Floats{};   // infinite or NaN: nothing
}
template <class W>
STABLE_RNN_INLINE Vec part_of(Vec x) {
  if constexpr (std::is_same<W, Remainder>::value) return remainder(x);
  else return x;
}

// The first n elements at p as words of W: width of them, or twice as many bfloat16; what is missing is zero.
template <class W, class T>
STABLE_RNN_INLINE Vec load_words(const T* p, int64_t n) {
  if constexpr (sizeof(W) == 4) {
    return load(p, n);
  } else {
    bf16 part[2 * width] = {};
    if constexpr (sizeof(T) == 2) {
      if (n >= 2 * width) return load(reinterpret_cast<const float*>(p));
      for (int64_t k = 0; k < n; ++k) part[k] = p[k];
    } else {
      store(part, part_of<W>(load(p, n)));
      if (n > width) store(part + width, part_of<W>(load(p + width, n - width)));
    }
    return load(reinterpret_cast<const float*>(part));
  }
}

// Everywhere the word at p, of a pair its first element alone where n is 1.
STABLE_RNN_INLINE Vec broadcast(const float* p, int) { return Vec(*p); }
STABLE_RNN_INLINE Vec broadcast(const bf16* p, int n) {
  int32_t pair = 0;
  std::memcpy(&pair, p, n * sizeof *p);
  return (Vec::Floats)(Vec::Ints{} + pair);
}

#if defined(__AVX512BF16__)
// sum + the products of words of pairs: the odd term first, each rounded to nearest, denormal numbers taken and given as zero.
STABLE_RNN_INLINE Vec add_products(Vec a, Vec b, Vec sum) {
  return _mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v);
}
#endif

// What x becomes when it is written as T and read again.
template <class T>
STABLE_RNN_INLINE Vec rounded(Vec x) {
  if constexpr (sizeof(T) == 4) return x;
  else return widen(narrow(x));
}

// x rounded to T, at p: a float, or a T.
template <class T, class S, class... Count>
STABLE_RNN_INLINE void store_rounded(S* p, Vec x, Count... n) {
  if constexpr (sizeof(S) == sizeof(T)) store(p, x, n...);
  else store(p, rounded<T>(x), n...);
}

// Elements of a (those with the bit s of their index clear) and of b, interleaved in blocks of s: the lower or the upper ones.
template <int s, bool upper, int... j>
STABLE_RNN_INLINE Vec interleave(Vec a, Vec b, std::integer_sequence<int, j...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a.v, b.v, (j & s ? width + j - (upper ? 0 : s) : j + (upper ? s : 0))...);
#else
  return __builtin_shuffle(a.v, b.v, Vec::Ints{(j & s ? width + j - (upper ? 0 : s) : j + (upper ? s : 0))...});
#endif
}

// Rows become columns: x[i][j] <-> x[j][i], in log2(width) rounds that exchange the off-diagonal blocks of size s.
template <int s = width / 2>
STABLE_RNN_INLINE void transpose(Vec* x) {
  constexpr std::make_integer_sequence<int, width> all{};
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i)
    if (!(i & s)) {
      const Vec a = x[i], b = x[i + s];
      x[i] = interleave<s, false>(a, b, all);
      x[i + s] = interleave<s, true>(a, b, all);
    }
  if constexpr (s > 1) transpose<s / 2>(x);
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
