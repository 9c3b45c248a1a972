// The instructions of amx.h in plain C++, for tests on machines that lack them: what the pseudo code of Intel's manual says (volume 2, "TDPBF16PS").
// What would fault there traps here. Registers have rows of `width` columns, so that no other instructions are asked for.
#pragma once
#include "simd.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

struct Emulated {
  int rows, bytes;
  unsigned char at[16][64];
};
inline thread_local Emulated emulated[8];

STABLE_RNN_INLINE void require(bool met) {
  if (!met) __builtin_trap();
}

STABLE_RNN_INLINE void tile_configure(const void* shapes) {
  const unsigned char* from = static_cast<const unsigned char*>(shapes);
  require(from[0] == 1 && from[1] == 0);
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, from + 16 + 2 * i, 2);
    emulated[i] = {from[48 + i], bytes, {}};
    require(emulated[i].rows <= 16 && emulated[i].bytes <= 64);
  }
}
STABLE_RNN_INLINE void tile_release() { std::memset(emulated, 0, sizeof emulated); }

template <int i>
STABLE_RNN_INLINE void tile_load(const void* from, int64_t stride) {
  require(emulated[i].rows);
  for (int r = 0; r < emulated[i].rows; ++r)
    std::memcpy(emulated[i].at[r], static_cast<const char*>(from) + r * stride, emulated[i].bytes);
}
template <int i>
STABLE_RNN_INLINE void tile_store(void* to, int64_t stride) {
  require(emulated[i].rows);
  for (int r = 0; r < emulated[i].rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, emulated[i].at[r], emulated[i].bytes);
}
template <int i>
STABLE_RNN_INLINE void tile_zero() {
  require(emulated[i].rows);
  std::memset(emulated[i].at, 0, sizeof emulated[i].at);
}

STABLE_RNN_INLINE Vec flushed(Vec x) {   // denormal numbers are zeros
  const Vec::Ints bits = (Vec::Ints)x.v;
  return (Vec::Floats)((bits & 0x7f800000) == 0 ? bits & int32_t(0x80000000) : bits);
}

template <int sums, int a, int b>
STABLE_RNN_INLINE void tile_add_products() {
  Emulated &c = emulated[sums], &s = emulated[a], &w = emulated[b];
  require(c.rows && c.rows == s.rows && c.bytes == w.bytes && s.bytes == 4 * w.rows && c.bytes == width * 4);
  for (int r = 0; r < c.rows; ++r) {
    Vec first(0.f), second(0.f);
    for (int k = 0; k < w.rows; ++k) {
      int32_t pair;
      std::memcpy(&pair, s.at[r] + 4 * k, 4);
      const Vec x((Vec::Floats)(Vec::Ints{} + pair));
      const Vec y = load(reinterpret_cast<const float*>(w.at[k]));
      first = flushed(fma(flushed(even(x)), flushed(even(y)), first));
      second = flushed(fma(flushed(odd(x)), flushed(odd(y)), second));
    }
    float* row = reinterpret_cast<float*>(c.at[r]);
    store(row, flushed(flushed(load(row)) + flushed(first + second)));
  }
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
