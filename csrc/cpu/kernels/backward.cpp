#include "backward.h"

#include "kernels.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

// The tensors of BackwardParams.
template <class T>
struct Tensors {
  const BackwardParams& p;

  static STABLE_RNN_INLINE int64_t row(const Run& run, int64_t s) { return run.first + s * run.move; }
  static STABLE_RNN_INLINE const T* in(const void* x) { return static_cast<const T*>(x); }

  STABLE_RNN_INLINE Vec output_gradient(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    const T* dy = in(p.dy) + row(run, s) * p.out + unit;
    __builtin_prefetch(dy + run.move * p.out);   // of the next step, here and below
    return load(dy, n);
  }
  STABLE_RNN_INLINE Vec output(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    const T* y = in(p.y) + row(run, s) * p.out + unit;
    __builtin_prefetch(y + run.move * p.out);
    return load(y, n);
  }
  STABLE_RNN_INLINE SavedStep<Vec> saved(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    const T* gates = in(p.gates) + row(run, s) * 4 * p.hidden + unit;
    const float* cell = p.cells + row(run, s) * p.hidden + unit;
    for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(gates + (run.move * 4 + gate) * p.hidden);
    __builtin_prefetch(cell + 2 * run.move * p.hidden);
    const bool first_time = run.last && s + 1 == run.steps;
    const Vec c_prev = !first_time ? load(cell + run.move * p.hidden, n)
                       : p.c0      ? load(in(p.c0) + run.b * p.hidden + unit, n)
                                   : Vec(0.f);
    return {load(gates, n), load(gates + p.hidden, n), load(gates + 2 * p.hidden, n), load(gates + 3 * p.hidden, n),
            load(cell, n), c_prev};
  }

  STABLE_RNN_INLINE void whole(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dh) const {
    if (p.dh && s >= run.warm) store(static_cast<T*>(p.dh) + row(run, s) * p.out + unit, dh, n);
  }
  STABLE_RNN_INLINE void gradient(int64_t, const Run& run, int64_t s, int gate, int64_t unit, int64_t n, Vec dz) const {
    if (s >= run.warm) store(static_cast<T*>(p.dz) + (row(run, s) * gates_of(p.cell) + gate) * p.hidden + unit, dz, n);
  }
  STABLE_RNN_INLINE void carried(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dh) const {
    border(run, s, p.out, unit, n, dh, p.dh_start, p.dh_end, p.dh0);
  }
  STABLE_RNN_INLINE void carried_cell(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dc) const {
    border(run, s, p.hidden, unit, n, dc, p.dc_start, p.dc_end, p.dc0);
  }
  static STABLE_RNN_INLINE void border(const Run& run, int64_t s, int64_t size, int64_t unit, int64_t n, Vec x, float* start,
                                       float* end, void* at_zero) {
    if (s == run.warm && start) store(start + run.id * size + unit, x, n);
    if (s < run.steps) return;
    if (end) store(end + run.id * size + unit, x, n);
    if (run.last && at_zero) store(static_cast<T*>(at_zero) + run.b * size + unit, x, n);
  }
};

template <class T, bool lstm>
const char* run_backward(const BackwardParams& p, const int64_t* entries, int64_t lanes) {
  using Tile = BackwardTile<T, lstm, Tensors<T>>;
  const Tiling tiling(p.threads, lanes, most_steps(p.lanes), p.hidden, gates_of(p.cell) * p.hidden * p.out);
  BackwardWeights weights(p.hidden, p.out, lstm, p.w_hr != nullptr, tiling.panel_threads());
  Workspace memory;
  const int64_t tile_bytes = Tile::bytes(tiling.rows, p.hidden, p.out);
  if (!memory.allocate(weights.bytes() + tiling.teams() * tile_bytes)) return out_of_memory;
  weights.take(memory);
  char* tile_memory = memory.take<char>(tiling.teams() * tile_bytes);
  const float saved_cap = rounded<T>(Vec(p.cap)).v[0];   // as the saved forget gates were rounded
  Counter counter;

  parallel(tiling.threads, tiling.together, [&](Team& team) {
    weights.pack(team, static_cast<const T*>(p.w_hh), static_cast<const T*>(p.w_hr));
    team.sync();
    for_each_tile(team, tiling, lanes, counter, [&](Team& own, int64_t first, int64_t n, int64_t slot) {
      Tile tile(weights, Tensors<T>{p}, p.cell, saved_cap, p.hidden, p.out, p.dh_n, p.dc_n, p.dh_init, p.dc_init);
      Workspace piece(tile_memory + slot * tile_bytes);
      tile.take(piece, tiling.rows);
      own.sync();   // nobody reads the last tile's runs any more
      for (int64_t r = own.begin(n); r < own.end(n); ++r) tile.runs[r] = backward_run(p.lanes, entries[first + r], p.dh_init);
      own.sync();
      tile.run(own, n);
    });
  });
  return nullptr;
}

}  // namespace

const char* backward(const BackwardParams& p, const int64_t* entries, int64_t lanes) {
  if (p.dtype == BF16) return p.cell == LSTM ? run_backward<bf16, true>(p, entries, lanes) : run_backward<bf16, false>(p, entries, lanes);
  return p.cell == LSTM ? run_backward<float, true>(p, entries, lanes) : run_backward<float, false>(p, entries, lanes);
}

}  // namespace STABLE_RNN_NS
}  // namespace stable_rnn
