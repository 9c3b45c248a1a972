// A cascade's run: in a block of times, group after group, each panel of units goes through all the block's times before the next panel
// begins. What the panel reads, the h of earlier groups, is known for the whole block, so that its sums are a product of many rows even
// for a single sequence; its own state passes from time to time inside the panel. Everything stays in the cache from panel to panel.
//
// The arithmetic of a unit is that of the plain recurrence (forward.h, backward.h), whose sums it takes up without the zeros of W_hh:
// the results are the same bits. Blocks, panels and threads do not change them.
//
// Threads: sequences of their own where there are enough. Else the panels are cut into as many *stages*, of about equal cost, which
// follow each other through the blocks: in turn (tick) n, stage s works on block n - s, and all meet after each.
#pragma once
#include "approximate.h"
#include "stable_rnn/cell.h"
#include "tiles.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

// Up to four vectors of units of a group (one, where they have several gates forward), and what they read.
struct CascadePanel {
  int64_t unit, units;   // the first, and how many
  int64_t from,
      columns;   // of each gate's sums: forward h of units [0, columns), backward d_hidden of units [from, from + columns)
  int vectors;   // of units
  float* weights;
};

// A piece of a sequence's run: steps [begin, begin + n) of row b.
struct Block {
  int64_t row, begin, n;
};

struct Cascade {
  const int64_t* groups;   // [count + 1] first units, and H
  int64_t count, gates;
  bool backward;
  int64_t hidden = 0, panels = 0, floats = 0, block = 0;
  int threads = 1, stages = 1;
  CascadePanel* panel = nullptr;
  int64_t* cut = nullptr;   // [stages + 1] panels

  Cascade(const int64_t* groups, int64_t count, int gates, bool backward, int wanted, int64_t rows, int64_t steps)
      : groups(groups), count(count), gates(gates), backward(backward), hidden(groups[count]) {
    constexpr double worth_a_thread = 1e6;                             // multiply-adds
    constexpr int64_t most_rows = 16 * block_rows, cached = 1 << 15;   // of a block; floats of its states
    double work = 0;
    each([&](const CascadePanel& q) {
      ++panels;
      floats += words(q);
      work += cost(q) * width;
    });
    work *= double(rows) * double(steps);
    threads = wanted < 1 ? 1 : work / worth_a_thread < wanted ? 1 + int(work / worth_a_thread) : wanted;
    if (rows < 4 * threads && threads > 1) {
      threads = uncrowded(threads);
      if (panels < threads) threads = int(panels);
      stages = threads;
    }
    const int64_t share = ceil_div(steps * rows, 8 * stages);   // enough blocks for the stages to overlap
    block = cached / (backward ? gates * hidden : hidden);
    if (stages > 1 && share < block) block = share;
    block = block < block_rows ? block_rows : block > most_rows ? most_rows : block / block_rows * block_rows;
  }
  // About the time of a row of a panel, in products of a vector: its sums, and what comes after them.
  double cost(const CascadePanel& q) const { return double(q.vectors) * gates * (double(q.columns) + 40); }

  int64_t words(const CascadePanel& q) const {
    return q.vectors * gates * round_up(q.columns, has_tiles ? amx_k / 2 : 1) * width;
  }
  int64_t bytes() const {
    return Workspace::bytes<float>(floats) + Workspace::bytes<CascadePanel>(panels) +
           Workspace::bytes<int64_t>(stages + 1);
  }
  void take(Workspace& memory) {
    float* weights = memory.take<float>(floats);
    panel = memory.take<CascadePanel>(panels);
    cut = memory.take<int64_t>(stages + 1);
    int64_t made = 0;
    double all = 0, sum = 0;
    each([&](CascadePanel q) {
      q.weights = weights;
      weights += words(q);
      panel[made++] = q;
      all += cost(q);
    });
    int stage = 0;
    for (int64_t i = 0; i < panels; ++i) {   // a stage begins where the middle of a panel is past its share
      while (stage < stages && (sum + cost(panel[i]) / 2) * stages >= all * stage) cut[stage++] = i;
      sum += cost(panel[i]);
    }
    while (stage <= stages) cut[stage++] = panels;
  }

 private:
  // body(panel), without weights, in the order in which panels are run.
  template <class Body>
  void each(const Body& body) const {
    const int64_t most = backward || gates == 1 ? panel_vectors : 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t g = backward ? count - 1 - i : i, first = groups[g], end = groups[g + 1];
      const int64_t vectors = ceil_div(end - first, width), parts = ceil_div(vectors, most);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = vectors * part / parts, next = vectors * (part + 1) / parts;
        CascadePanel q{};
        q.unit = first + begin * width;
        q.units = (next == vectors ? end : first + next * width) - q.unit;
        q.from = backward ? end : 0;
        q.columns = backward ? hidden - end : first;
        q.vectors = int(next - begin);
        body(q);
      }
    }
  }
};

// Memory of a run's blocks: the states that products read, and what a panel leaves to itself in the next block.
template <class S>
struct CascadeMemory {
  int64_t stride, size;
  S *states, *last;   // [stages][block + 1][columns]: row i is before step i; its last row
  float *c, *h;       // of each unit

  static int64_t bytes(const Cascade& plan, int64_t columns) {
    const int64_t row = state_stride(columns);
    return Workspace::bytes<S>(plan.stages * (plan.block + 1) * row) + Workspace::bytes<S>(row) +
           2 * Workspace::bytes<float>(state_stride(plan.hidden));
  }
  CascadeMemory(char* memory, const Cascade& plan, int64_t columns)
      : stride(state_stride(columns)), size((plan.block + 1) * stride) {
    Workspace piece(memory);
    states = piece.take<S>(plan.stages * size);
    last = piece.take<S>(stride);
    c = piece.take<float>(state_stride(plan.hidden));
    h = piece.take<float>(state_stride(plan.hidden));
  }
};

// Runs every sequence, run_of(entry): pack(panel) first, then run(panel, run, block, states, memory) in the order that panels and blocks
// need.
template <class S, class Sequence, class Pack, class RunPanel>
const char* run_cascade(const int64_t* entries, int64_t rows, const Sequence& run_of, Cascade& plan, int64_t columns,
                        const Pack& pack, const RunPanel& run) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) count += ceil_div(run_of(entries[r]).stages, plan.block);
  const int64_t slot_bytes = CascadeMemory<S>::bytes(plan, columns), slots = plan.stages > 1 ? 1 : plan.threads;
  Workspace memory;
  if (!memory.allocate(plan.bytes() + Workspace::bytes<Run>(rows) + Workspace::bytes<Block>(count) +
                       Workspace::bytes<int64_t>(rows + 1) + slots * slot_bytes))
    return out_of_memory;
  plan.take(memory);
  Run* runs = memory.take<Run>(rows);
  Block* blocks = memory.take<Block>(count);
  int64_t* first = memory.take<int64_t>(rows + 1);   // block of each row
  char* slot = memory.take<char>(slots * slot_bytes);
  first[0] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    runs[r] = run_of(entries[r]);
    Block* next = blocks + first[r];
    for (int64_t s = 0; s < runs[r].stages; s += plan.block)
      *next++ = {r, s, runs[r].stages - s < plan.block ? runs[r].stages - s : plan.block};
    first[r + 1] = next - blocks;
  }
  Counter counter;

  parallel(plan.threads, plan.stages > 1, [&](Team& team) {
    for (int64_t i = team.begin(plan.panels); i < team.end(plan.panels); ++i) pack(plan.panel[i]);
    team.sync();
    // Blocks [begin, end): each passes the stages one after the other, a tick for each, and each stage takes them in order.
    const auto pass = [&](Team& own, const CascadeMemory<S>& m, int64_t begin, int64_t end) {
      for (int64_t tick = begin; tick < end + plan.stages - 1; ++tick) {
        for (int64_t s = own.begin(plan.stages); s < own.end(plan.stages); ++s) {
          const int64_t i = tick - s;
          if (i < begin || i >= end) continue;
          S* states = m.states + i % plan.stages * m.size;
          for (int64_t q = plan.cut[s]; q < plan.cut[s + 1]; ++q)
            run(plan.panel[q], runs[blocks[i].row], blocks[i], states, m);
        }
        own.sync();
      }
    };
    if (plan.stages > 1) pass(team, CascadeMemory<S>(slot, plan, columns), 0, count);
    else
      for (int64_t r; (r = counter.next()) < rows;) {
        Team alone;
        pass(alone, CascadeMemory<S>(slot + team.rank * slot_bytes, plan, columns), first[r], first[r + 1]);
      }
    team.sync();
  });
  return nullptr;
}

// acc[r][v]: the sums of `rows` rows of states, over `parts` times the panel's columns, `gap` apart; v < size.
template <class W, class S>
STABLE_RNN_INLINE void cascade_sums(const CascadePanel& q, int size, int rows, const S* states, int64_t stride,
                                    int parts, int64_t gap, Vec* acc) {
  for (int i = 0; i < rows * size; ++i) acc[i] = Vec(0.f);
  if (!q.columns) return;
  for (int part = 0; part < parts; ++part) {
    const S* a = states + part * gap + q.from;
    const float* w = q.weights + part * q.columns * size * width;
    multiply_panel<W, true>(size, rows, a, stride, w, q.columns, acc);
  }
}

// A panel through a block of times. A Sink is that of forward.h.
template <class T, class Cell, class Sink>
struct CascadeForward {
  using S = StateOf<T>;
  using Real = RealOf<T>;
  Cell cell;
  int64_t hidden;
  const T *xp, *h0, *c0, *bias;
  Sink sink;

  void pack(const CascadePanel& q, const T* w_hh) const {
    if (!q.columns) return;
    const int size = q.vectors * Cell::gates;
    for (int v = 0; v < q.vectors; ++v)
      for (int gate = 0; gate < Cell::gates; ++gate)
        pack_transposed<S>(w_hh + (gate * hidden + q.unit + v * width) * hidden, hidden, q.units - v * width, q.columns,
                           q.weights + (v * Cell::gates + gate) * width, int64_t(size) * width);
  }

  void operator()(const CascadePanel& q, const Run& run, const Block& block, S* states,
                  const CascadeMemory<S>& m) const {
    const int size = q.vectors * Cell::gates;
    for (int v = 0; v < q.vectors; ++v) {
      const int64_t unit = q.unit + v * width, n = q.units - v * width;
      const auto given = [&](const T* x) { return x ? load(x + run.b * hidden + unit, n) : Vec(0.f); };
      store(states + unit, block.begin ? load(m.last + unit, n) : given(h0), n);
      if (Cell::has_cell && !block.begin) store(m.c + unit, given(c0), n);
    }
    constexpr int most = rows_at_once<S, S>;
    for (int64_t i = 0; i < block.n; i += most) {
      const int rows = int(block.n - i < most ? block.n - i : most);
      Vec sums[most * panel_vectors];
      cascade_sums<S>(q, size, rows, states + i * m.stride, m.stride, 1, 0, sums);
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < q.vectors; ++v)
          units(run, block.begin + i + r, q.unit + v * width, q.units - v * width, sums + r * size + v * Cell::gates,
                states + (i + r) * m.stride, m);
    }
    for (int64_t u = q.unit; u < q.unit + q.units; u += width)
      store(m.last + u, load(states + block.n * m.stride + u, q.unit + q.units - u), q.unit + q.units - u);
  }

 private:
  STABLE_RNN_INLINE void units(const Run& run, int64_t s, int64_t unit, int64_t n, const Vec* sums, S* states,
                               const CascadeMemory<S>& m) const {
    const T* at = xp + (run.first + s * run.move) * Cell::gates * hidden + unit;
    Real z[Cell::gates], x[Cell::gates];
    for (int gate = 0; gate < Cell::gates; ++gate) {
      __builtin_prefetch(at + (rows_at_once<S, S> * run.move * Cell::gates + gate) * hidden);
      z[gate] = sums[gate];
      x[gate] = load(at + gate * hidden, n);
    }
    State<Real> before{Real(0.f), Real(0.f)};
    if constexpr (Cell::h_before) before.h = load(states + unit, n);
    if constexpr (Cell::has_cell) before.c = load(m.c + unit, n);
    const Real b = Cell::hidden_bias >= 0 && bias ? load(bias + unit, n) : Vec(0.f);
    const auto now = cell.step(z, x, b, before);
    if constexpr (Cell::has_cell) store(m.c + unit, now.c, n);
    sink.step(0, run, s, unit, n, before.c, now);
    store_rounded<T>(states + m.stride + unit, now.h, n);
    sink.hidden(0, run, s, unit, n, states + unit, now.h);
  }
};

// The same in reverse time: states are d_hidden of the step after. A Port is that of backward.h.
template <class T, class Cell, class Port>
struct CascadeBackward {
  Cell cell;
  int64_t hidden;
  const T *dh_n, *dc_n;
  Port port;

  void pack(const CascadePanel& q, const T* w_hh) const {
    float* to = q.weights;
    for (int gate = 0; gate < Cell::gates; ++gate)
      for (int64_t k = q.from; k < q.from + q.columns; ++k)
        for (int v = 0; v < q.vectors; ++v, to += width)
          store(to, load(w_hh + (gate * hidden + k) * hidden + q.unit + v * width, q.units - v * width));
  }

  void operator()(const CascadePanel& q, const Run& run, const Block& block, float* states,
                  const CascadeMemory<float>& m) const {
    for (int v = 0; v < q.vectors; ++v) {
      const int64_t unit = q.unit + v * width, n = q.units - v * width;
      const auto given = [&](const T* x) { return x ? load(x + run.b * hidden + unit, n) : Vec(0.f); };
      for (int64_t at = unit; at < Cell::gates * hidden; at += hidden)
        store(states + at, block.begin ? load(m.last + at, n) : Vec(0.f), n);
      if (block.begin) continue;
      store(m.h + unit, given(dh_n), n);
      if (Cell::has_cell) store(m.c + unit, given(dc_n), n);
    }
    for (int64_t i = 0; i < block.n; i += block_rows) {
      const int rows = int(block.n - i < block_rows ? block.n - i : block_rows);
      Vec sums[block_rows * panel_vectors];
      cascade_sums<float>(q, q.vectors, rows, states + i * m.stride, m.stride, Cell::gates, hidden, sums);
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < q.vectors; ++v)
          units(run, block.begin + i + r, q.unit + v * width, q.units - v * width, sums[r * q.vectors + v],
                states + (i + r + 1) * m.stride, m);
    }
    for (int gate = 0; gate < Cell::gates; ++gate)
      for (int64_t u = q.unit; u < q.unit + q.units; u += width)
        store(m.last + gate * hidden + u, load(states + block.n * m.stride + gate * hidden + u, q.unit + q.units - u),
              q.unit + q.units - u);
  }

 private:
  STABLE_RNN_INLINE void units(const Run& run, int64_t s, int64_t unit, int64_t n, Vec dh, float* states,
                               const CascadeMemory<float>& m) const {
    if (s == 0) dh = load(m.h + unit, n);
    else if constexpr (Cell::h_before) dh = dh + load(m.h + unit, n);
    port.carried(0, run, s, unit, n, dh);
    State<Vec> d{dh, Vec(0.f)};
    if constexpr (Cell::has_cell) {
      d.c = load(m.c + unit, n);
      port.carried_cell(0, run, s, unit, n, d.c);
    }
    if (s == run.steps) return;
    d.h = dh + port.output_gradient(0, run, s, unit, n);
    Saved<Cell, Vec> kept;
    port.saved(0, run, s, unit, n, kept);
    const auto adjoint = cell.vjp(d, kept, port.after(0, run, s, unit, n), port.before(0, run, s, unit, n));
    if constexpr (Cell::has_cell) store(m.c + unit, adjoint.before.c, n);
    if constexpr (Cell::h_before) store(m.h + unit, adjoint.before.h, n);
    Vec d_hidden[Cell::gates];
    for (int gate = 0; gate < Cell::gates; ++gate) {
      d_hidden[gate] = cell.hidden(gate, adjoint.z[gate], kept);
      store(states + gate * hidden + unit, d_hidden[gate], n);
    }
    port.gradient(0, run, s, unit, n, adjoint.z, d_hidden);
  }
};

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
