#include "backward.h"

#include "kernels.h"
#include "scanned.h"
#include "stable_rnn/cells.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

// The tensors of BackwardParams.
template <class T, class Cell>
struct Tensors {
  const BackwardParams& p;

  static STABLE_RNN_INLINE int64_t row(const Run& run, int64_t s) { return run.first + s * run.move; }
  static STABLE_RNN_INLINE const T* in(const void* x) { return static_cast<const T*>(x); }

  STABLE_RNN_INLINE Vec output_gradient(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    if (!p.dy) return Vec(0.f);
    const T* dy = in(p.dy) + row(run, s) * p.out + unit;
    __builtin_prefetch(dy + run.move * p.out);   // of the next step, here and below
    return load(dy, n);
  }
  STABLE_RNN_INLINE void saved(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec* kept) const {
    const T* from = in(p.saved) + row(run, s) * Cell::saved * p.hidden + unit;
    for (int i = 0; i < Cell::saved; ++i) {
      __builtin_prefetch(from + (run.move * Cell::saved + i) * p.hidden);
      kept[i] = load(from + i * p.hidden, n);
    }
    if constexpr (Cell::forgets >= 0)
      if (p.decay && s >= run.warm)
        multiply_decay(p.decay + run.id * p.hidden + unit, s == run.warm, kept[Cell::forgets], n);
  }
  STABLE_RNN_INLINE State<Vec> after(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    State<Vec> state{Vec(0.f), Vec(0.f)};
    if constexpr (Cell::h_after) {
      const T* y = in(p.y) + row(run, s) * p.out + unit;
      __builtin_prefetch(y + run.move * p.out);
      state.h = load(y, n);
    }
    if constexpr (Cell::has_cell) {
      const float* c = p.cells + row(run, s) * p.hidden + unit;
      __builtin_prefetch(c + 2 * run.move * p.hidden);
      state.c = load(c, n);
    }
    return state;
  }
  STABLE_RNN_INLINE State<Vec> before(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    const bool first_time = run.last && s + 1 == run.steps;
    const auto of = [&](const auto* x, const void* x0, int64_t size) {
      return !first_time ? load(x + row(run, s + 1) * size + unit, n)
             : x0        ? load(in(x0) + run.b * size + unit, n)
                         : Vec(0.f);
    };
    State<Vec> state{Vec(0.f), Vec(0.f)};
    if constexpr (Cell::h_before) state.h = of(in(p.y), p.h0, p.out);
    if constexpr (Cell::has_cell) state.c = of(p.cells, p.c0, p.hidden);
    return state;
  }

  STABLE_RNN_INLINE void whole(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dh) const {
    if (p.dh && s >= run.warm) store(static_cast<T*>(p.dh) + row(run, s) * p.out + unit, dh, n);
  }
  STABLE_RNN_INLINE void gradient(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, const Vec* dz,
                                  const Vec*) const {
    if (s < run.warm || !p.dz) return;
    for (int gate = 0; gate < Cell::gates; ++gate)
      store(static_cast<T*>(p.dz) + (row(run, s) * Cell::gates + gate) * p.hidden + unit, dz[gate], n);
  }
  STABLE_RNN_INLINE void carried(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dh) const {
    border(run, s, p.out, unit, n, dh, p.dh_start, p.dh_end, p.dh0);
  }
  STABLE_RNN_INLINE void carried_cell(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dc) const {
    border(run, s, p.hidden, unit, n, dc, p.dc_start, p.dc_end, p.dc0);
  }
  static STABLE_RNN_INLINE void border(const Run& run, int64_t s, int64_t size, int64_t unit, int64_t n, Vec x,
                                       float* start, float* end, void* at_zero) {
    if (s == run.warm && start) store(start + run.id * size + unit, x, n);
    if (s < run.steps) return;
    if (end) store(end + run.id * size + unit, x, n);
    if (run.last && at_zero) store(static_cast<T*>(at_zero) + run.b * size + unit, x, n);
  }
};

template <class T, class W, class Cell>
const char* run_backward(const BackwardParams& p, Cell cell, const int64_t* entries, int64_t lanes) {
  using Tile = BackwardTile<T, W, Cell, Tensors<T, Cell>>;
  const Tiling tiling(p.threads, lanes, most_steps(p.lanes), p.hidden, Cell::gates * p.hidden * p.out);
  BackwardWeights<W> weights(p.hidden, p.out, Cell::gates, p.w_hr != nullptr, tiling);
  Workspace memory;
  const int64_t tile_bytes = Tile::bytes(tiling.rows, p.hidden, p.out);
  if (!memory.allocate(weights.bytes() + tiling.teams() * tile_bytes)) return out_of_memory;
  weights.take(memory);
  char* tile_memory = memory.take<char>(tiling.teams() * tile_bytes);
  Counter counter;

  parallel(tiling.threads, tiling.together, [&](Team& team) {
    weights.pack(team, static_cast<const T*>(p.w_hh), static_cast<const T*>(p.w_hr));
    team.sync();
    for_each_tile(team, tiling, lanes, counter, [&](Team& own, int64_t first, int64_t n, int64_t slot) {
      Tile tile(weights, Tensors<T, Cell>{p}, cell, p.hidden, p.out, p.dh_n, p.dc_n, p.dh_init, p.dc_init);
      Workspace piece(tile_memory + slot * tile_bytes);
      tile.take(piece, tiling.rows);
      own.sync();   // nobody reads the last tile's runs any more
      for (int64_t r = own.begin(n); r < own.end(n); ++r)
        tile.runs[r] = backward_run(p.lanes, entries[first + r], p.dh_init);
      own.sync();
      tile.run(own, n);
    });
  });
  return nullptr;
}

template <class T, class Cell>
const char* scan_backward(const BackwardParams& p, Cell cell, const int64_t* groups, int64_t count,
                          const int64_t* entries, int64_t rows) {
  const auto in = [](const void* x) { return static_cast<const T*>(x); };
  Cascade plan(groups, count, Cell::gates, true, p.threads, rows, p.lanes.steps);
  const CascadeBackward<T, Cell, Tensors<T, Cell>> panels{cell, p.hidden, in(p.dh_n), in(p.dc_n), Tensors<T, Cell>{p}};
  return run_cascade<float>(
      entries, rows, [&](int64_t entry) { return backward_run(p.lanes, entry, false); }, plan, Cell::gates * p.hidden,
      [&](const CascadePanel& q) { panels.pack(q, in(p.w_hh)); }, panels);
}

template <class T>
const char* scanned_of(const BackwardParams& p, const int64_t* groups, int64_t count, const int64_t* entries,
                       int64_t rows) {
  const float cap = rounded<T>(Vec(p.cap)).v[0];   // as the saved forget gates were rounded
  return dispatch_cell(p.cell, cap, [&](auto cell) { return scan_backward<T>(p, cell, groups, count, entries, rows); });
}

template <class T, class W>
const char* backward_of(const BackwardParams& p, const int64_t* entries, int64_t lanes) {
  const float cap = rounded<T>(Vec(p.cap)).v[0];   // as the saved forget gates were rounded
  return dispatch_cell(p.cell, cap, [&](auto cell) { return run_backward<T, W>(p, cell, entries, lanes); });
}

}   // namespace

const char* scanned_backward(const BackwardParams& p, const int64_t* groups, int64_t count, const int64_t* entries,
                             int64_t rows) {
  return p.dtype == BF16 ? scanned_of<bf16>(p, groups, count, entries, rows)
                         : scanned_of<float>(p, groups, count, entries, rows);
}

const char* backward(const BackwardParams& p, const int64_t* entries, int64_t lanes) {
  return p.dtype == BF16           ? backward_of<bf16, bf16>(p, entries, lanes)
         : p.dtype == BF16_WEIGHTS ? backward_of<float, bf16>(p, entries, lanes)
                                   : backward_of<float, float>(p, entries, lanes);
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
