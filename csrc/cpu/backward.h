// The adjoint recursion of a tile of lanes, in reverse time. Stage s of a lane takes up the adjoint carried from the step after (its
// product of dz with W_hh), adds what the outputs say, and leaves dz for the next stage; one last stage only passes the carry on.
// Where all this comes from and goes to is up to a Port: the caller's tensors (backward.cpp), or the workspace of windows.
#pragma once
#include "stable_rnn/cell.h"
#include "tiles.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

// Packed for this direction: carry = dz W_hh, and dm = dh W_hr where there is a projection.
struct BackwardWeights {
  Panels gates, projection;
  bool projected;

  BackwardWeights(int64_t hidden, int64_t out, bool lstm, bool projected, int threads)
      : gates(hidden * (lstm ? 4 : 1), out, 1, threads), projection(out, hidden, 1, threads), projected(projected) {}
  int64_t bytes() const {
    return Workspace::bytes<float>(gates.floats()) + (projected ? Workspace::bytes<float>(projection.floats()) : 0);
  }
  void take(Workspace& memory) {
    gates.data = memory.take<float>(gates.floats());
    if (projected) projection.data = memory.take<float>(projection.floats());
  }
  template <class T>
  void pack(const Team& team, const T* w_hh, const T* w_hr) {
    for (int64_t p = team.begin(gates.count); p < team.end(gates.count); ++p) pack_columns(gates, p, w_hh);
    if (projected)
      for (int64_t p = team.begin(projection.count); p < team.end(projection.count); ++p) pack_columns(projection, p, w_hr);
  }
};

template <class V>
struct SavedStep {
  V i, f, g, o, c, c_prev;
};

// T is the storage type of the starting adjoints. A Port has, with r the lane's row in the tile and n how many units exist:
//   output_gradient(r, run, s, unit, n) -> dy        whole(r, run, s, unit, n, dh)        dh with dy
//   carried(r, run, s, unit, n, dh)                  dh as a stage finds it, without dy; s == run.steps: for the time before
//   carried_cell(r, run, s, unit, n, dc)             the same for the cell
//   output(r, run, s, unit, n) -> h (RNN)            saved(r, run, s, unit, n) -> SavedStep (LSTM)
//   gradient(r, run, s, gate, unit, n, dz)
template <class T, bool lstm, class Port>
struct BackwardTile {
  int kind;
  float cap;
  int64_t hidden, out;
  const T *dh_n, *dc_n;
  const float *dh_init, *dc_init;
  const BackwardWeights& weights;
  Port port;
  int64_t h_stride, c_stride, z_stride;
  float *carry = nullptr, *z_now = nullptr, *z_next = nullptr, *c = nullptr;   // carry: dh at the start; with a projection, of each stage
  Run* runs = nullptr;

  BackwardTile(const BackwardWeights& weights, const Port& port, int kind, float cap, int64_t hidden, int64_t out, const void* dh_n,
               const void* dc_n, const float* dh_init, const float* dc_init)
      : kind(kind), cap(cap), hidden(hidden), out(out), dh_n(static_cast<const T*>(dh_n)), dc_n(static_cast<const T*>(dc_n)),
        dh_init(dh_init), dc_init(dc_init), weights(weights), port(port), h_stride(state_stride(out)),
        c_stride(state_stride(hidden)), z_stride(state_stride(weights.gates.k)) {}

  static int64_t bytes(int64_t rows, int64_t hidden, int64_t out) {
    return Workspace::bytes<float>(rows * state_stride(out)) + 2 * Workspace::bytes<float>(rows * state_stride(hidden * (lstm ? 4 : 1))) +
           lstm * Workspace::bytes<float>(rows * state_stride(hidden)) + Workspace::bytes<Run>(rows);
  }
  void take(Workspace& memory, int64_t rows) {
    carry = memory.take<float>(rows * h_stride);
    z_now = memory.take<float>(rows * z_stride);
    z_next = memory.take<float>(rows * z_stride);
    if (lstm) c = memory.take<float>(rows * c_stride);
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
    begin_state(carry + r * h_stride, out, run.given && dh_n ? dh_n + run.b * out : nullptr, dh_init ? dh_init + run.entry * out : nullptr);
    if (lstm)
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
    if (!weights.projected) return;
    each_panel(team, weights.projection, s, [&](int64_t p) {
      const int64_t first = weights.projection.first(p) * width;
      const int size = weights.projection.size(p);
      multiply(carry, h_stride, active, weights.projection, p, [&](int64_t r, const Vec* dm) {
        for (int v = 0; v < size; ++v) lstm_units(r, s, first + v * width, dm[v]);
      });
    });
    team.sync();
  }

  STABLE_RNN_INLINE void take_up(int64_t r, int64_t s, int64_t unit, Vec dh) {
    const Run& run = runs[r];
    const int64_t n = out - unit;
    float* kept = carry + r * h_stride + unit;
    if (s == 0) dh = load(kept);
    port.carried(r, run, s, unit, n, dh);
    if (s < run.steps) {
      dh = dh + port.output_gradient(r, run, s, unit, n);
      port.whole(r, run, s, unit, n, dh);
    }
    if (weights.projected) return store(kept, dh);
    if constexpr (lstm) lstm_units(r, s, unit, dh);
    else if (s < run.steps) {
      const Vec dz = rnn_vjp(dh, port.output(r, run, s, unit, n), kind == RNN_RELU);
      store(z_next + r * z_stride + unit, dz);
      port.gradient(r, run, s, 0, unit, n, dz);
    }
  }

  STABLE_RNN_INLINE void lstm_units(int64_t r, int64_t s, int64_t unit, Vec dm) {
    const Run& run = runs[r];
    const int64_t n = hidden - unit;
    float* cell = c + r * c_stride + unit;
    const Vec dc = load(cell);
    port.carried_cell(r, run, s, unit, n, dc);
    if (s == run.steps) return;
    const SavedStep<Vec> at = port.saved(r, run, s, unit, n);
    const LstmAdjoint<Vec> d = lstm_vjp(dm, dc, at.i, at.f, at.g, at.o, at.c, at.c_prev, cap);
    store(cell, d.c_prev);
    const Vec dz[4] = {d.zi, d.zf, d.zg, d.zo};
    for (int gate = 0; gate < 4; ++gate) {
      store(z_next + r * z_stride + gate * hidden + unit, dz[gate], n);
      port.gradient(r, run, s, gate, unit, n, dz[gate]);
    }
  }
};

}  // namespace STABLE_RNN_NS
}  // namespace stable_rnn
