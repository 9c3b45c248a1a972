// Products of bfloat16 in the processor's tile registers (AMX; "tiles" without more are those of lanes, tiles.h): up to 16 rows of
// states times 16 columns of a panel, 32 k at an instruction. Only for instruction set `amx`; other sets see three constants.
//
// Registers 0 to 3 hold sums, 4 and 5 states (of a `Split`: their high and low parts), 6 and 7 weights, likewise.
#pragma once
#include <type_traits>

#include "simd.h"
#if defined(STABLE_RNN_EMULATE_AMX)
#include "amx_emulated.h"
#endif

namespace stable_rnn {
namespace STABLE_RNN_NS {

constexpr int amx_rows = 16, amx_k = 32;

// A float as the sum of two bfloat16, `high` and what that leaves. Products of two take three of bfloat16: high high + high low + low high.
struct Split {
  bf16 high, low;
};
template <class W>
constexpr bool is_split = std::is_same<W, Split>::value;

// Whether states S times weights W are multiplied in tiles; what float32 is multiplied as where three products of bfloat16 may be.
template <class S, class W>
constexpr bool in_tiles = has_tiles && (sizeof(S) == 2 || is_split<W>);
using Threefold = std::conditional<has_tiles, Split, float>::type;

// A row of states for products with `Split`: `stride` floats, in their second half their high and then their low parts.
STABLE_RNN_INLINE bf16* parts(float* row, int64_t stride) { return reinterpret_cast<bf16*>(row + stride / 2); }
STABLE_RNN_INLINE void store_parts(float* row, int64_t stride, int64_t unit, Vec x) {
  store(parts(row, stride) + unit, x);
  store(parts(row, stride) + stride / 2 + unit, remainder(x));
}

// acc[r][v] = sum over k of a[r][k] * panel[k][v] for at most 16 rows and 4 of the panel's `size` vectors, going on from acc where `more`.
// A sum takes up 32 k at a time: those of the even k in a chain of their own, those of the odd k in another, and then both together.
template <class W, int vectors, bool more, class S>
void multiply_in_tiles(int rows, const S* a, int64_t lda, const float* panel, int64_t k, int size, Vec* acc);

#if STABLE_RNN_TILES
#if !defined(STABLE_RNN_EMULATE_AMX)
// GCC's own intrinsics do not say that loads read memory.
template <int i>
STABLE_RNN_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(i) : "memory");
}
template <int i>
STABLE_RNN_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(i) : "memory");
}
template <int i>
STABLE_RNN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(i));
}
template <int sums, int a, int b>
STABLE_RNN_INLINE void tile_add_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}
STABLE_RNN_INLINE void tile_configure(const void* shapes) { asm volatile("ldtilecfg (%0)" : : "r"(shapes) : "memory"); }
STABLE_RNN_INLINE void tile_release() { asm volatile("tilerelease" : : : "memory"); }
#endif

inline thread_local int configured = 0;   // rows that this thread's registers are for

STABLE_RNN_INLINE void configure_tiles(int rows) {
  if (rows == configured) return;
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};   // of a row of each register
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.bytes[i] = uint16_t(i == 4 || i == 5 ? amx_k * 2 : width * 4);
    shapes.rows[i] = uint8_t(i < 6 ? rows : amx_k / 2);
  }
  tile_configure(&shapes);
  configured = rows;
}

// Registers must not stay in use: they would slow down each change of threads.
STABLE_RNN_INLINE void release_tiles() {
  if (configured) tile_release();
  configured = 0;
}

// Sums of column v take up 32 k; `step` floats from a row of a panel to the next, `low` to the low parts of its weights.
template <int v, int vectors, bool split>
STABLE_RNN_INLINE void add_columns(const float* words, int64_t step, int64_t low) {
  tile_load<6>(words + v * width, step * 4);
  if constexpr (split) {
    tile_load<7>(words + low + v * width, step * 4);
    tile_add_products<v, 5, 6>();
    tile_add_products<v, 4, 7>();
  }
  tile_add_products<v, 4, 6>();
  if constexpr (v + 1 < vectors) add_columns<v + 1, vectors, split>(words, step, low);
}

template <int v, int vectors, bool more>
STABLE_RNN_INLINE void begin_sums(Vec* acc, int64_t step) {
  if constexpr (more) tile_load<v>(acc + v, step * 4);
  else tile_zero<v>();
  if constexpr (v + 1 < vectors) begin_sums<v + 1, vectors, more>(acc, step);
}

template <int v, int vectors>
STABLE_RNN_INLINE void end_sums(Vec* acc, int64_t step) {
  tile_store<v>(acc + v, step * 4);
  if constexpr (v + 1 < vectors) end_sums<v + 1, vectors>(acc, step);
}

template <class W, int vectors, bool more, class S>
void multiply_in_tiles(int rows, const S* a, int64_t lda, const float* panel, int64_t k, int size, Vec* acc) {
  constexpr bool split = is_split<W>;
  const bf16* states = reinterpret_cast<const bf16*>(split ? a + lda / 2 : a);
  const int64_t stride = split ? 2 * lda : lda, low = lda / 2, step = (1 + split) * size * width;
  configure_tiles(rows);
  begin_sums<0, vectors, more>(acc, size * width);
  for (int64_t j = 0; j < k; j += amx_k, states += amx_k, panel += amx_k / 2 * step) {
    alignas(64) bf16 last[1 + split][amx_rows][amx_k];   // zeros behind the last states, as in the panel
    if (k - j < amx_k)
      for (int i = 0; i < (1 + split) * rows; ++i)
        for (int u = 0; u < amx_k; u += width)
          store(&last[i / rows][i % rows][u], load(states + i / rows * low + i % rows * stride + u, k - j - u));
    const bool whole = k - j >= amx_k;
    tile_load<4>(whole ? states : last[0][0], whole ? stride * 2 : amx_k * 2);
    if constexpr (split) tile_load<5>(whole ? states + low : last[1][0], whole ? stride * 2 : amx_k * 2);
    add_columns<0, vectors, split>(panel, step, size * width);
  }
  end_sums<0, vectors>(acc, size * width);
}
#else
STABLE_RNN_INLINE void release_tiles() {}
#endif

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
