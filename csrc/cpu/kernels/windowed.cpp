// The backward pass of windows: each tile of lanes runs forward, leaving its states in the workspace, and back over them.
#include "backward.h"
#include "forward.h"
#include "kernels.h"
#include "stable_rnn/cells.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

using Params = WindowedBackwardParams;

// What one group of lanes shares, and where its pieces lie. Steps s count a lane's own steps forward in time.
template <class T, class Cell>
struct Windows {
  const Params& p;
  int64_t k, most_steps;   // of the workspace; of a lane
  int64_t c_stride, h_stride;
  float *dh0, *dc0;   // [lanes from time 0] their adjoints there, by lane - first

  explicit Windows(const Params& p)
      : p(p), k(p.lanes.warmup + 1), most_steps(k < p.lanes.steps ? k : p.lanes.steps),
        c_stride(state_stride(p.hidden)), h_stride(state_stride(p.out)) {}

  int64_t from_zero() const {   // lanes of the group that start at time 0
    const int64_t end = most_steps * p.lanes.batch;
    return p.first < end ? (p.last < end ? p.last : end) - p.first : 0;
  }
  STABLE_RNN_INLINE int64_t row(const Run& run, int64_t s) const { return (run.id - p.first) * k + k - run.steps + s; }
  STABLE_RNN_INLINE float* dz(const Run& run, int64_t s) const { return p.dz + row(run, s) * Cell::gates * p.hidden; }
  STABLE_RNN_INLINE float* h_prev(const Run& run, int64_t s) const { return p.h_prev + row(run, s) * p.out; }

  // Rows of the workspace for the steps that lane `id` does not have.
  void clear_missing(int64_t id) const {
    const int64_t missing = k - forward_run(p.lanes, id, false).steps, at = (id - p.first) * k;
    const auto clear = [&](float* x, int64_t size) {
      if (x) std::memset(x + at * size, 0, missing * size * sizeof(float));
    };
    clear(p.dz, Cell::gates * p.hidden);
    clear(p.d_hidden, Cell::gates * p.hidden);
    clear(p.h_prev, p.out);
    clear(p.dh, p.out);
    clear(p.m, p.hidden);
  }

  // dxp of row b and time t: dz of every lane of the group whose window holds t, lanes upwards.
  void collect(int64_t b, int64_t t) const {
    const int64_t size = Cell::gates * p.hidden, batch = p.lanes.batch, length = length_of(p.lanes, b);
    float* sum = p.dxp + row_of(p.lanes, b, t) * size;
    for (int64_t end = t; end < length && end - t < k; ++end) {
      const int64_t id = end * batch + b;
      if (id < p.first || id >= p.last) continue;
      const float* part = p.dz + ((id - p.first) * k + k - 1 - (end - t)) * size;
      for (int64_t u = 0; u < size; u += width)
        store(sum + u, load(sum + u, size - u) + load(part + u, size - u), size - u);
    }
  }

  // dh0 and dc0 of row b.
  void collect_start(int64_t b) const {
    const int64_t batch = p.lanes.batch, length = length_of(p.lanes, b);
    for (int64_t end = 0; end < length && end < k; ++end) {
      const int64_t lane = end * batch + b - p.first;
      if (lane < 0 || lane >= p.last - p.first) continue;
      for (int64_t u = 0; u < p.out && p.dh0; ++u) p.dh0[b * p.out + u] += dh0[lane * p.out + u];
      for (int64_t u = 0; u < p.hidden && Cell::has_cell && p.dc0; ++u)
        p.dc0[b * p.hidden + u] += dc0[lane * p.hidden + u];
    }
  }
};

// The memory of a tile beside that of the two recurrences. What a step saves lies where its dz will, if that is as wide.
template <class Cell>
struct States {
  float *cells, *last,
      *saved;   // c before each step and after the last, [rows][steps + 1]; the last h; [rows][steps][S*H] or null

  static constexpr bool own_saved = Cell::saved > Cell::gates;
};

template <class T, class Cell>
STABLE_RNN_INLINE float* saved_of(const Windows<T, Cell>& w, const States<Cell>& states, int64_t r, const Run& run,
                                  int64_t s) {
  return States<Cell>::own_saved ? states.saved + (r * w.most_steps + s) * Cell::saved * w.p.hidden : w.dz(run, s);
}

template <class T, class Cell>
struct Recorder {   // a Sink
  const Windows<T, Cell>& w;
  States<Cell> states;

  STABLE_RNN_INLINE void hidden(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n, const StateOf<T>* before,
                                Vec h) const {
    store(w.h_prev(run, s) + unit, load(before), n);
    if (Cell::h_after && s + 1 == run.steps) store(states.last + r * w.h_stride + unit, rounded<T>(h));
  }
  template <class Step>
  STABLE_RNN_INLINE void step(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n, Vec c_before,
                              const Step& now) const {
    Saved<Cell, RealOf<T>> kept;
    now.save(kept);
    float* to = saved_of(w, states, r, run, s) + unit;
    for (int i = 0; i < Cell::saved; ++i) store(to + i * w.p.hidden, kept[i], n);
    if constexpr (Cell::has_cell) {
      float* c = states.cells + (r * (w.most_steps + 1) + s) * w.c_stride + unit;
      if (s == 0) store(c, c_before);
      store(c + w.c_stride, now.c);
    }
    if (Cell::projects && w.p.m) store(w.p.m + w.row(run, s) * w.p.hidden + unit, now.h, n);
  }
};

template <class T, class Cell>
struct Player {   // a Port; its s counts backward
  const Windows<T, Cell>& w;
  States<Cell> states;

  static STABLE_RNN_INLINE int64_t step(const Run& run, int64_t s) { return run.steps - 1 - s; }

  STABLE_RNN_INLINE Vec output_gradient(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    return s ? Vec(0.f) : load(static_cast<const T*>(w.p.dy) + run.first * w.p.out + unit, n);
  }
  STABLE_RNN_INLINE void saved(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n, Vec* kept) const {
    const float* from = saved_of(w, states, r, run, step(run, s)) + unit;
    for (int i = 0; i < Cell::saved; ++i) kept[i] = load(from + i * w.p.hidden, n);
  }
  STABLE_RNN_INLINE const float* cells(int64_t r, const Run& run, int64_t s, int64_t unit) const {   // before the step
    return states.cells + (r * (w.most_steps + 1) + step(run, s)) * w.c_stride + unit;
  }
  STABLE_RNN_INLINE State<Vec> after(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    State<Vec> state{Vec(0.f), Vec(0.f)};
    if constexpr (Cell::h_after)
      state.h = s ? load(w.h_prev(run, step(run, s) + 1) + unit, n) : load(states.last + r * w.h_stride + unit);
    if constexpr (Cell::has_cell) state.c = load(cells(r, run, s, unit) + w.c_stride);
    return state;
  }
  STABLE_RNN_INLINE State<Vec> before(int64_t r, const Run& run, int64_t s, int64_t unit, int64_t n) const {
    State<Vec> state{Vec(0.f), Vec(0.f)};
    if constexpr (Cell::h_before) state.h = load(w.h_prev(run, step(run, s)) + unit, n);
    if constexpr (Cell::has_cell) state.c = load(cells(r, run, s, unit));
    return state;
  }
  STABLE_RNN_INLINE void whole(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec dh) const {
    if (w.p.dh) store(w.p.dh + w.row(run, step(run, s)) * w.p.out + unit, dh, n);
  }
  STABLE_RNN_INLINE void gradient(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, const Vec* dz,
                                  const Vec* d_hidden) const {
    const int64_t at = w.row(run, step(run, s)) * Cell::gates * w.p.hidden + unit;
    for (int gate = 0; gate < Cell::gates; ++gate) {
      store(w.p.dz + at + gate * w.p.hidden, dz[gate], n);
      if (Cell::hidden_bias >= 0) store(w.p.d_hidden + at + gate * w.p.hidden, d_hidden[gate], n);
    }
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

template <class T, class W, class Cell>
const char* run_windowed(const Params& p, Cell cell, const int64_t* entries, int64_t lanes) {
  using Forward = ForwardTile<T, W, Cell, Recorder<T, Cell>>;
  using Plain = typename std::conditional<is_split<W>, T, W>::type;   // adjoints are never split
  using Backward = BackwardTile<T, Plain, Cell, Player<T, Cell>>;
  const bool projected = p.w_hr != nullptr;
  Windows<T, Cell> windows(p);
  const Tiling tiling(p.threads, lanes, 2 * windows.most_steps, p.hidden, Cell::gates * p.hidden * p.out);
  ForwardWeights<W> forward_weights(p.hidden, p.out, Cell::gates, projected, tiling);
  BackwardWeights<Plain> backward_weights(p.hidden, p.out, Cell::gates, projected, tiling);
  const int64_t starts = windows.from_zero();
  const int64_t cells = Cell::has_cell ? tiling.rows * (windows.most_steps + 1) * windows.c_stride : 0;
  const int64_t last = Cell::h_after ? tiling.rows * windows.h_stride : 0;
  const int64_t saved = States<Cell>::own_saved ? tiling.rows * windows.most_steps * Cell::saved * p.hidden : 0;
  const int64_t tile_bytes = Forward::bytes(tiling.rows, p.hidden, p.out, projected) +
                             Backward::bytes(tiling.rows, p.hidden, p.out) + Workspace::bytes<float>(cells) +
                             Workspace::bytes<float>(last) + Workspace::bytes<float>(saved);
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
      const States<Cell> states{piece.take<float>(cells), piece.take<float>(last), piece.take<float>(saved)};
      Forward forward(forward_weights, Recorder<T, Cell>{windows, states}, cell, p.xp, p.h0, p.c0, p.hidden_bias,
                      nullptr, nullptr);
      Backward backward(backward_weights, Player<T, Cell>{windows, states}, cell, p.hidden, p.out, p.dh_n, p.dc_n,
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

}   // namespace

const char* windowed_backward(const Params& p, const int64_t* entries, int64_t lanes) {
  return dispatch_cell(p.cell, p.cap, [&](auto cell) {
    return p.dtype == BF16                ? run_windowed<bf16, bf16>(p, cell, entries, lanes)
           : p.dtype == BF16_WEIGHTS      ? run_windowed<float, bf16>(p, cell, entries, lanes)
           : p.dtype == BF16X3 && !p.w_hr ? run_windowed<float, Threefold>(p, cell, entries, lanes)
                                          : run_windowed<float, float>(p, cell, entries, lanes);
  });
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
