// The forward recurrence of a tile of lanes: at each step one product with the packed weights and, on its sums while they are at
// hand, the gate arithmetic. What is kept of it all is up to a Sink: the caller's outputs (forward.cpp), or the workspace of windows.
#pragma once
#include "approximate.h"
#include "stable_rnn/cell.h"
#include "tiles.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

// The weights of a problem, packed: z = h W_hh^T, and h = m W_hr^T where there is a projection.
template <class W>
struct ForwardWeights {
  Panels<W> gates, projection;
  bool projected;

  ForwardWeights(int64_t hidden, int64_t out, int gates, bool projected, const Tiling& tiling)
      : gates(out, hidden, gates, tiling.panel_threads(), tiling.few()),
        projection(hidden, out, 1, tiling.panel_threads(), tiling.few()), projected(projected) {}
  int64_t bytes() const {
    return Workspace::bytes<float>(gates.words()) + (projected ? Workspace::bytes<float>(projection.words()) : 0);
  }
  void take(Workspace& memory) {
    gates.data = memory.take<float>(gates.words());
    if (projected) projection.data = memory.take<float>(projection.words());
  }
  template <class T>
  void pack(const Team& team, const T* w_hh, const T* w_hr) {
    for (int64_t p = team.begin(gates.count); p < team.end(gates.count); ++p) pack_rows(gates, p, w_hh);
    if (projected)
      for (int64_t p = team.begin(projection.count); p < team.end(projection.count); ++p)
        pack_rows(projection, p, w_hr);
  }
};

// T is the storage type, W that of the packed weights. Where that is `Split`, a row of states has its two parts beside it.
// A Sink has, with r the lane's row in the tile and n how many of a vector's units exist:
//   hidden(r, run, s, unit, n, before, h)     h of units [unit, unit + n) before step s (an address) and after it, not yet rounded to T
//   step(r, run, s, unit, n, c_before, now)   what else the step made (Cell::Step)
template <class T, class W, class Cell, class Sink>
struct ForwardTile {
  using S = StateOf<T>;
  using Real = RealOf<T>;
  static_assert(Cell::gates <= panel_vectors, "a panel holds all gates of a unit");
  static_assert(!(Cell::projects && Cell::h_before), "a projected h is not the unit's own");

  // the problem
  Cell cell;
  int64_t hidden, out;
  const T *xp, *h0, *c0, *bias;
  const float *h_init, *c_init;
  const ForwardWeights<W>& weights;
  Sink sink;
  // the memory of a tile
  int64_t h_stride, c_stride;
  S *h_now = nullptr, *h_next = nullptr;
  float *c = nullptr, *m = nullptr;
  Run* runs = nullptr;

  ForwardTile(const ForwardWeights<W>& weights, const Sink& sink, Cell cell, const void* xp, const void* h0,
              const void* c0, const void* hidden_bias, const float* h_init, const float* c_init)
      : cell(cell), hidden(weights.gates.units), out(weights.gates.k), xp(static_cast<const T*>(xp)),
        h0(static_cast<const T*>(h0)), c0(static_cast<const T*>(c0)), bias(static_cast<const T*>(hidden_bias)),
        h_init(h_init), c_init(c_init), weights(weights), sink(sink), h_stride(row(out)),
        c_stride(state_stride(hidden)) {}

  static int64_t row(int64_t out) { return (1 + is_split<W>)*state_stride(out); }
  static int64_t bytes(int64_t rows, int64_t hidden, int64_t out, bool projected) {
    return 2 * Workspace::bytes<S>(rows * row(out)) +
           (Cell::has_cell + projected) * Workspace::bytes<float>(rows * state_stride(hidden)) +
           Workspace::bytes<Run>(rows);
  }
  void take(Workspace& memory, int64_t rows) {
    h_now = memory.take<S>(rows * h_stride);
    h_next = memory.take<S>(rows * h_stride);
    if (Cell::has_cell) c = memory.take<float>(rows * c_stride);
    if (weights.projected) m = memory.take<float>(rows * c_stride);
    runs = memory.take<Run>(rows);
  }

  // Runs the n lanes in `runs`, longest first, to their ends. A member of a team works on a copy of the tile of its own.
  void run(Team& team, int64_t n) {
    bool zeros = !weights.gates.not_finite;
    for (int64_t r = 0; r < n; ++r) zeros = zeros && !(runs[r].given && h0) && !h_init;
    for (int64_t r = team.begin(n); r < team.end(n); ++r) start(r);
    team.sync();
    int64_t active = n;
    for (int64_t s = 0; s < runs[0].steps; ++s) {
      while (runs[active - 1].steps <= s) --active;
      step(team, s, active, zeros && s == 0 ? nullptr : h_now);   // a product with zeros is zero
      S* last = h_now;
      h_now = h_next;
      h_next = last;
    }
  }

 private:
  void start(int64_t r) {
    const Run& run = runs[r];
    begin_state(h_now + r * h_stride, out, run.given && h0 ? h0 + run.b * out : nullptr,
                h_init ? h_init + run.entry * out : nullptr);
    for (int64_t u = 0; is_split<W> && u < out; u += width) split(h_now + r * h_stride, u);
    if (Cell::has_cell)
      begin_state(c + r * c_stride, hidden, run.given && c0 ? c0 + run.b * hidden : nullptr,
                  c_init ? c_init + run.entry * hidden : nullptr);
  }

  STABLE_RNN_INLINE void split(S* state, int64_t unit) const {
    if constexpr (is_split<W>) store_parts(state, h_stride, unit, load(state + unit));
  }

  void step(Team& team, int64_t s, int64_t active, const S* state) {
    each_panel(team, weights.gates, s, [&](int64_t p) {
      const int64_t unit = weights.gates.first(p) * width;
      const int size = weights.gates.size(p);
      multiply(state, h_stride, active, weights.gates, p, [&](int64_t r, const Vec* z) {
        for (int v = 0; v < size / Cell::gates; ++v) units(r, s, unit + v * width, z + v * Cell::gates);
      });
    });
    team.sync();
    if (!weights.projected) return;
    each_panel(team, weights.projection, s, [&](int64_t p) {
      const int64_t unit = weights.projection.first(p) * width;
      const int size = weights.projection.size(p);
      multiply(m, c_stride, active, weights.projection, p, [&](int64_t r, const Vec* h) {
        for (int v = 0; v < size; ++v) emit(r, s, unit + v * width, h[v]);
      });
    });
    team.sync();
  }

  STABLE_RNN_INLINE void units(int64_t r, int64_t s, int64_t unit, const Vec* sums) {
    const Run& run = runs[r];
    const int64_t n = hidden - unit;
    const T* at = xp + (run.first + s * run.move) * Cell::gates * hidden + unit;
    const T* next = at + run.move * Cell::gates * hidden;   // of the next step
    Real z[Cell::gates], x[Cell::gates];
    for (int gate = 0; gate < Cell::gates; ++gate) {
      __builtin_prefetch(next + gate * hidden);
      z[gate] = sums[gate];
    }
    if (n >= width)   // one question for all gates
      for (int gate = 0; gate < Cell::gates; ++gate) x[gate] = load(at + gate * hidden);
    else
      for (int gate = 0; gate < Cell::gates; ++gate) x[gate] = load(at + gate * hidden, n);
    State<Real> before{Real(0.f), Real(0.f)};
    if constexpr (Cell::h_before) before.h = load(h_now + r * h_stride + unit);
    if constexpr (Cell::has_cell) before.c = load(c + r * c_stride + unit);
    const Real b = Cell::hidden_bias >= 0 && bias ? load(bias + unit, n) : Vec(0.f);
    const auto now = cell.step(z, x, b, before);
    if constexpr (Cell::has_cell) store(c + r * c_stride + unit, now.c);
    sink.step(r, run, s, unit, n, before.c, now);
    if (Cell::projects && weights.projected) store(m + r * c_stride + unit, now.h);
    else emit(r, s, unit, now.h);
  }

  STABLE_RNN_INLINE void emit(int64_t r, int64_t s, int64_t unit, Vec h) {
    store_rounded<T>(h_next + r * h_stride + unit, h);
    split(h_next + r * h_stride, unit);
    sink.hidden(r, runs[r], s, unit, out - unit, h_now + r * h_stride + unit, h);
  }
};

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
