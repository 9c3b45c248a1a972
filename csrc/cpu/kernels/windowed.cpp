// The backward pass of windows: each tile of lanes runs forward, leaving its states in the workspace, and back over them.
#include "backward.h"
#include "forward.h"
#include "kernels.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

using Params = WindowedBackwardParams;

// What one group of lanes shares, and where its pieces lie. Steps s count a lane's own steps forward in time.
template <class T, bool lstm>
struct Windows {
  const Params& p;
  int64_t k, most_steps;       // of the workspace; of a lane
  int64_t c_stride, h_stride;
  float *dh0, *dc0;            // [lanes from time 0] their adjoints there, by lane - first

  explicit Windows(const Params& p)
      : p(p), k(p.lanes.warmup + 1), most_steps(k < p.lanes.steps ? k : p.lanes.steps), c_stride(state_stride(p.hidden)),
        h_stride(state_stride(p.out)) {}

  int64_t from_zero() const {   // lanes of the group that start at time 0
    const int64_t end = most_steps * p.lanes.batch;
    return p.first < end ? (p.last < end ? p.last : end) - p.first : 0;
  }
  static STABLE_RNN_INLINE int64_t gates() { return lstm ? 4 : 1; }
  STABLE_RNN_INLINE int64_t row(const Run& run, int64_t s) const { return (run.id - p.first) * k + k - run.steps + s; }
  STABLE_RNN_INLINE float* dz(const Run& run, int64_t s) const { return p.dz + row(run, s) * gates() * p.hidden; }
  STABLE_RNN_INLINE float* h_prev(const Run& run, int64_t s) const { return p.h_prev + row(run, s) * p.out; }

  // Rows of the workspace for the steps that lane `id` does not have.
  void clear_missing(int64_t id) const {
    const int64_t missing = k - forward_run(p.lanes, id, false).steps, at = (id - p.first) * k;
    const auto clear = [&](float* x, int64_t size) {
      if (x) std::memset(x + at * size, 0, missing * size * sizeof(float));
    };
    clear(p.dz, gates() * p.hidden);
    clear(p.h_prev, p.out);
    clear(p.dh, p.out);
    clear(p.m, p.hidden);
  }

  // dxp of row b and time t: dz of every lane of the group whose window holds t, lanes upwards.
  void collect(int64_t b, int64_t t) const {
    const int64_t size = gates() * p.hidden, batch = p.lanes.batch, length = length_of(p.lanes, b);
    float* sum = p.dxp + row_of(p.lanes, b, t) * size;
    for (int64_t end = t; end < length && end - t < k; ++end) {
      const int64_t id = end * batch + b;
      if (id < p.first || id >= p.last) continue;
      const float* part = p.dz + ((id - p.first) * k + k - 1 - (end - t)) * size;
      for (int64_t u = 0; u < size; u += width) store(sum + u, load(sum + u, size - u) + load(part + u, size - u), size - u);
    }
  }

  // dh0 and dc0 of row b.
  void collect_start(int64_t b) const {
    const int64_t batch = p.lanes.batch, length = length_of(p.lanes, b);
    for (int64_t end = 0; end < length && end < k; ++end) {
      const int64_t lane = end * batch + b - p.first;
      if (lane < 0 || lane >= p.last - p.first) continue;
      for (int64_t u = 0; u < p.out && p.dh0; ++u) p.dh0[b * p.out + u] += dh0[lane * p.out + u];
      for (int64_t u = 0; u < p.hidden && lstm && p.dc0; ++u) p.dc0[b * p.hidden + u] += dc0[lane * p.hidden + u];
    }
  }
};

// The memory of a tile beside that of the two recurrences: cells[r][s] before each step and after the last, or the RNN's last h.
struct States {
  float *cells, *last;
};

template <class T, bool lstm>
struct Recorder {   // a Sink
  const Windows<T, lstm>& w;
  States states;

  STABLE_RNN_INLINE void hidden(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n, const float* before, Vec h) const {
    store(w.h_prev(run, s) + unit, load(before), n);
    if (!lstm && s + 1 == run.steps) store(states.last + r * w.h_stride + unit, h);
  }
  STABLE_RNN_INLINE void cell(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n, Vec c_prev, const LstmStep<Vec>& now) const {
    float* gates = w.dz(run, s) + unit;
    store(gates, now.i.value(), n);
    store(gates + w.p.hidden, now.f, n);
    store(gates + 2 * w.p.hidden, now.g.value(), n);
    store(gates + 3 * w.p.hidden, now.o.value(), n);
    float* cell = states.cells + (r * (w.most_steps + 1) + s) * w.c_stride + unit;
    if (s == 0) store(cell, c_prev);
    store(cell + w.c_stride, now.c);
    if (w.p.m) store(w.p.m + w.row(run, s) * w.p.hidden + unit, now.m, n);
  }
};

template <class T, bool lstm>
struct Player {   // a Port; its s counts backward
  const Windows<T, lstm>& w;
  States states;

  static STABLE_RNN_INLINE int64_t step(const Run& run, int64_t s) { return run.steps - 1 - s; }

  STABLE_RNN_INLINE Vec output_gradient(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    return s ? Vec(0.f) : load(static_cast<const T*>(w.p.dy) + run.first * w.p.out + unit, n);
  }
  STABLE_RNN_INLINE Vec output(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    return s ? load(w.h_prev(run, step(run, s) + 1) + unit, n) : load(states.last + r * w.h_stride + unit);
  }
  STABLE_RNN_INLINE SavedStep<Vec> saved(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    const float* gates = w.dz(run, step(run, s)) + unit;
    const int64_t hidden = w.p.hidden;
    const float* cell = states.cells + (r * (w.most_steps + 1) + step(run, s)) * w.c_stride + unit;
    return {load(gates, n), load(gates + hidden, n), load(gates + 2 * hidden, n), load(gates + 3 * hidden, n),
            load(cell + w.c_stride), load(cell)};
  }
  STABLE_RNN_INLINE void whole(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dh) const {
    if (w.p.dh) store(w.p.dh + w.row(run, step(run, s)) * w.p.out + unit, dh, n);
  }
  STABLE_RNN_INLINE void gradient(int64_t, const Run& run, int64_t s, int gate, int64_t unit, int64_t n, Vec dz) const {
    store(w.dz(run, step(run, s)) + gate * w.p.hidden + unit, dz, n);
  }
  STABLE_RNN_INLINE void carried(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dh) const {
    if (s == run.steps) store(w.dh0 + (run.id - w.p.first) * w.p.out + unit, dh, n);
  }
  STABLE_RNN_INLINE void carried_cell(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dc) const {
    if (s == run.steps) store(w.dc0 + (run.id - w.p.first) * w.p.hidden + unit, dc, n);
  }
};

// The same lane the other way round; only lanes that start from h0 carry their adjoint on to it.
STABLE_RNN_INLINE Run turned(Run run) {
  const bool from_start = run.given;
  run.first += (run.steps - 1) * run.move;
  run.move = -run.move;
  run.warm = 0;
  run.stages = run.steps + from_start;
  run.given = run.last;
  run.last = from_start;
  return run;
}

template <class T, bool lstm>
const char* run_windowed(const Params& p, const int64_t* entries, int64_t lanes) {
  using Forward = ForwardTile<T, lstm, Recorder<T, lstm>>;
  using Backward = BackwardTile<T, lstm, Player<T, lstm>>;
  const bool projected = p.w_hr != nullptr;
  Windows<T, lstm> windows(p);
  const Tiling tiling(p.threads, lanes, 2 * windows.most_steps, p.hidden, Windows<T, lstm>::gates() * p.hidden * p.out);
  ForwardWeights forward_weights(p.hidden, p.out, lstm, projected, tiling.panel_threads());
  BackwardWeights backward_weights(p.hidden, p.out, lstm, projected, tiling.panel_threads());
  const int64_t starts = windows.from_zero();
  const int64_t cells = lstm ? tiling.rows * (windows.most_steps + 1) * windows.c_stride : 0;
  const int64_t last = lstm ? 0 : tiling.rows * windows.h_stride;
  const int64_t tile_bytes = Forward::bytes(tiling.rows, p.hidden, p.out, projected) +
                             Backward::bytes(tiling.rows, p.hidden, p.out) + Workspace::bytes<float>(cells) +
                             Workspace::bytes<float>(last);
  Workspace memory;
  if (!memory.allocate(forward_weights.bytes() + backward_weights.bytes() + Workspace::bytes<float>(starts * p.out) +
                       Workspace::bytes<float>(starts * p.hidden) + tiling.teams() * tile_bytes))
    return out_of_memory;
  forward_weights.take(memory);
  backward_weights.take(memory);
  windows.dh0 = memory.take<float>(starts * p.out);
  windows.dc0 = memory.take<float>(starts * p.hidden);
  char* tile_memory = memory.take<char>(tiling.teams() * tile_bytes);
  Counter counter;

  parallel(tiling.threads, tiling.together, [&](Team& team) {
    forward_weights.pack(team, static_cast<const T*>(p.w_hh), static_cast<const T*>(p.w_hr));
    backward_weights.pack(team, static_cast<const T*>(p.w_hh), static_cast<const T*>(p.w_hr));
    for (int64_t id = p.first + team.begin(p.last - p.first); id < p.first + team.end(p.last - p.first); ++id)
      windows.clear_missing(id);
    team.sync();
    for_each_tile(team, tiling, lanes, counter, [&](Team& own, int64_t first, int64_t n, int64_t slot) {
      Workspace piece(tile_memory + slot * tile_bytes);
      const States states{piece.take<float>(cells), piece.take<float>(last)};
      Forward forward(forward_weights, Recorder<T, lstm>{windows, states}, p.cell, p.cap, p.xp, p.h0, p.c0, nullptr, nullptr);
      Backward backward(backward_weights, Player<T, lstm>{windows, states}, p.cell, p.cap, p.hidden, p.out, p.dh_n, p.dc_n,
                        nullptr, nullptr);
      forward.take(piece, tiling.rows);
      backward.take(piece, tiling.rows);
      own.sync();   // nobody reads the last tile's runs any more
      for (int64_t r = own.begin(n); r < own.end(n); ++r) {
        forward.runs[r] = forward_run(p.lanes, entries[first + r], false);
        backward.runs[r] = turned(forward.runs[r]);
      }
      own.sync();
      forward.run(own, n);
      backward.run(own, n);
    });
    team.sync();
    const int64_t batch = p.lanes.batch, last_time = (p.last - 1) / batch;
    const int64_t first_time = p.first / batch < windows.most_steps ? 0 : p.first / batch - windows.most_steps + 1;
    const int64_t rows = (last_time - first_time + 1) * batch;
    for (int64_t i = team.begin(rows); i < team.end(rows); ++i) windows.collect(i % batch, first_time + i / batch);
    for (int64_t b = team.begin(batch); b < team.end(batch); ++b) windows.collect_start(b);
    team.sync();
  });
  return nullptr;
}

}  // namespace

const char* windowed_backward(const Params& p, const int64_t* entries, int64_t lanes) {
  if (p.dtype == BF16) return p.cell == LSTM ? run_windowed<bf16, true>(p, entries, lanes) : run_windowed<bf16, false>(p, entries, lanes);
  return p.cell == LSTM ? run_windowed<float, true>(p, entries, lanes) : run_windowed<float, false>(p, entries, lanes);
}

}  // namespace STABLE_RNN_NS
}  // namespace stable_rnn
