// The adjoint recursion of a tile of lanes, in reverse time. Stage s of a lane takes up the adjoint carried from the step after (the
// product of its sums' adjoints with W_hh), adds what the outputs say, and leaves its own sums' adjoints for the next stage; one last
// stage only passes the carry on. Where all this comes from and goes to is up to a Port: the caller's tensors (backward.cpp), or the workspace of windows.
#pragma once
#include "stable_rnn/cell.h"
#include "tiles.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

// Packed for this direction: carry = dz W_hh, and dm = dh W_hr where there is a projection.
template <class W>
struct BackwardWeights {
  Panels<W> gates, projection;
  bool projected;

  BackwardWeights(int64_t hidden, int64_t out, int gates, bool projected, const Tiling& tiling)
      : gates(hidden * gates, out, 1, tiling.panel_threads(), tiling.few()),
        projection(out, hidden, 1, tiling.panel_threads(), tiling.few()), projected(projected) {}
  int64_t bytes() const {
    return Workspace::bytes<float>(gates.words()) + (projected ? Workspace::bytes<float>(projection.words()) : 0);
  }
  void take(Workspace& memory) {
    gates.data = memory.take<float>(gates.words());
    if (projected) projection.data = memory.take<float>(projection.words());
  }
  template <class T>
  void pack(const Team& team, const T* w_hh, const T* w_hr) {
    for (int64_t p = team.begin(gates.count); p < team.end(gates.count); ++p) pack_columns(gates, p, w_hh);
    if (projected)
      for (int64_t p = team.begin(projection.count); p < team.end(projection.count); ++p)
        pack_columns(projection, p, w_hr);
  }
};

// T is the storage type of the starting adjoints, W that of the packed weights.
// A Port has, with r the lane's row in the tile and n how many units exist:
//   output_gradient(r, run, s, unit, n) -> dy        whole(r, run, s, unit, n, dh)        dh with dy
//   carried(r, run, s, unit, n, dh)                  dh as a stage finds it, without dy; s == run.steps: for the time before
//   carried_cell(r, run, s, unit, n, dc)             the same for the cell
//   saved(r, run, s, unit, n, kept)                  fills kept[Cell::saved]
//   before(r, run, s, unit, n) -> State              what the cell wants of the states before the step, and after(...) after it
//   gradient(r, run, s, unit, n, dz, d_hidden)       adjoints of the gates' x and of their hidden sums
template <class T, class W, class Cell, class Port>
struct BackwardTile {
  Cell cell;
  int64_t hidden, out;
  const T *dh_n, *dc_n;
  const float *dh_init, *dc_init;
  const BackwardWeights<W>& weights;
  Port port;
  int64_t h_stride, c_stride, z_stride;
  float* carry =
      nullptr;   // dh at the start; with a projection, of each stage; with h_before, its part of the next stage's
  float *z_now = nullptr, *z_next = nullptr, *c = nullptr;
  Run* runs = nullptr;

  BackwardTile(const BackwardWeights<W>& weights, const Port& port, Cell cell, int64_t hidden, int64_t out,
               const void* dh_n, const void* dc_n, const float* dh_init, const float* dc_init)
      : cell(cell), hidden(hidden), out(out), dh_n(static_cast<const T*>(dh_n)), dc_n(static_cast<const T*>(dc_n)),
        dh_init(dh_init), dc_init(dc_init), weights(weights), port(port), h_stride(state_stride(out)),
        c_stride(state_stride(hidden)), z_stride(state_stride(weights.gates.k)) {}

  static int64_t bytes(int64_t rows, int64_t hidden, int64_t out) {
    return Workspace::bytes<float>(rows * state_stride(out)) +
           2 * Workspace::bytes<float>(rows * state_stride(hidden * Cell::gates)) +
           Cell::has_cell * Workspace::bytes<float>(rows * state_stride(hidden)) + Workspace::bytes<Run>(rows);
  }
  void take(Workspace& memory, int64_t rows) {
    carry = memory.take<float>(rows * h_stride);
    z_now = memory.take<float>(rows * z_stride);
    z_next = memory.take<float>(rows * z_stride);
    if (Cell::has_cell) c = memory.take<float>(rows * c_stride);
    runs = memory.take<Run>(rows);
  }

  void run(Team& team, int64_t n) {
    for (int64_t r = team.begin(n); r < team.end(n); ++r) start(r);
    team.sync();
    int64_t active = n;
    for (int64_t s = 0; s < runs[0].stages; ++s) {
      while (runs[active - 1].stages <= s) --active;
      stage(team, s, active);
      float* last = z_now;
      z_now = z_next;
      z_next = last;
    }
  }

 private:
  void start(int64_t r) {
    const Run& run = runs[r];
    begin_state(carry + r * h_stride, out, run.given && dh_n ? dh_n + run.b * out : nullptr,
                dh_init ? dh_init + run.entry * out : nullptr);
    if (Cell::has_cell)
      begin_state(c + r * c_stride, hidden, run.given && dc_n ? dc_n + run.b * hidden : nullptr,
                  dc_init ? dc_init + run.entry * hidden : nullptr);
  }

  void stage(Team& team, int64_t s, int64_t active) {
    each_panel(team, weights.gates, s, [&](int64_t p) {
      const int64_t first = weights.gates.first(p) * width;
      const int size = weights.gates.size(p);
      multiply(s ? z_now : nullptr, z_stride, active, weights.gates, p, [&](int64_t r, const Vec* sums) {
        for (int v = 0; v < size; ++v) take_up(r, s, first + v * width, sums[v]);
      });
    });
    team.sync();
    if (!(Cell::projects && weights.projected)) return;
    each_panel(team, weights.projection, s, [&](int64_t p) {
      const int64_t first = weights.projection.first(p) * width;
      const int size = weights.projection.size(p);
      multiply(carry, h_stride, active, weights.projection, p, [&](int64_t r, const Vec* dm) {
        for (int v = 0; v < size; ++v) units(r, s, first + v * width, dm[v]);
      });
    });
    team.sync();
  }

  STABLE_RNN_INLINE void take_up(int64_t r, int64_t s, int64_t unit, Vec dh) {
    const Run& run = runs[r];
    const int64_t n = out - unit;
    float* kept = carry + r * h_stride + unit;
    if (s == 0) dh = load(kept);
    else if constexpr (Cell::h_before) dh = dh + load(kept);
    port.carried(r, run, s, unit, n, dh);
    if (s < run.steps) {
      dh = dh + port.output_gradient(r, run, s, unit, n);
      port.whole(r, run, s, unit, n, dh);
    }
    if (Cell::projects && weights.projected) store(kept, dh);
    else units(r, s, unit, dh);
  }

  STABLE_RNN_INLINE void units(int64_t r, int64_t s, int64_t unit, Vec dh) {
    const Run& run = runs[r];
    const int64_t n = hidden - unit;
    State<Vec> d{dh, Vec(0.f)};
    if constexpr (Cell::has_cell) {
      d.c = load(c + r * c_stride + unit);
      port.carried_cell(r, run, s, unit, n, d.c);
    }
    if (s == run.steps) return;
    Saved<Cell, Vec> kept;
    port.saved(r, run, s, unit, n, kept);
    const auto adjoint = cell.vjp(d, kept, port.after(r, run, s, unit, n), port.before(r, run, s, unit, n));
    if constexpr (Cell::has_cell) store(c + r * c_stride + unit, adjoint.before.c);
    if constexpr (Cell::h_before) store(carry + r * h_stride + unit, adjoint.before.h);
    Vec d_hidden[Cell::gates];
    for (int gate = 0; gate < Cell::gates; ++gate) {
      d_hidden[gate] = cell.hidden(gate, adjoint.z[gate], kept);
      store(z_next + r * z_stride + gate * hidden + unit, d_hidden[gate], n);
    }
    port.gradient(r, run, s, unit, n, adjoint.z, d_hidden);
  }
};

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
