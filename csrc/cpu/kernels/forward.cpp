#include "forward.h"

#include "kernels.h"
#include "scanned.h"
#include "stable_rnn/cells.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

// The outputs of ForwardParams.
template <class T, class Cell>
struct Outputs {
  const ForwardParams& p;

  STABLE_RNN_INLINE void hidden(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, const StateOf<T>* before,
                                Vec h) const {
    if (s < run.warm) return;
    const int64_t row = run.first + s * run.move;
    if (p.y) store(static_cast<T*>(p.y) + row * p.out + unit, h, n);
    if (s == run.warm && p.h_start) store(p.h_start + run.id * p.out + unit, load(before), n);
    if (s + 1 < run.steps) return;
    if (p.h_end) store(p.h_end + run.id * p.out + unit, rounded<T>(h), n);
    if (p.h_n && run.last) store(static_cast<T*>(p.h_n) + run.b * p.out + unit, h, n);
  }

  template <class Step>
  STABLE_RNN_INLINE void step(int64_t, const Run& run, int64_t s, int64_t unit, int64_t n, Vec c_before,
                              const Step& now) const {
    if (s < run.warm) return;
    const int64_t row = run.first + s * run.move;
    if (Cell::saved && (p.saved || p.decay)) {
      Saved<Cell, RealOf<T>> kept;
      now.save(kept);
      if constexpr (Cell::forgets >= 0)
        if (p.decay) multiply_decay(p.decay + run.id * p.hidden + unit, s == run.warm, kept[Cell::forgets], n);
      for (int i = 0; i < Cell::saved && p.saved; ++i)
        store(static_cast<T*>(p.saved) + (row * Cell::saved + i) * p.hidden + unit, kept[i], n);
    }
    if constexpr (Cell::has_cell) {
      if (p.cells) store(p.cells + row * p.hidden + unit, now.c, n);
      if (s == run.warm && p.c_start) store(p.c_start + run.id * p.hidden + unit, c_before, n);
      if (s + 1 < run.steps) return;
      if (p.c_end) store(p.c_end + run.id * p.hidden + unit, now.c, n);
      if (p.c_n && run.last) store(static_cast<T*>(p.c_n) + run.b * p.hidden + unit, now.c, n);
    }
  }
};

template <class T, class W, class Cell>
const char* run_forward(const ForwardParams& p, Cell cell, const int64_t* entries, int64_t lanes) {
  using Tile = ForwardTile<T, W, Cell, Outputs<T, Cell>>;
  const Tiling tiling(p.threads, lanes, most_steps(p.lanes), p.hidden, Cell::gates * p.hidden * p.out);
  ForwardWeights<W> weights(p.hidden, p.out, Cell::gates, p.w_hr != nullptr, tiling);
  Workspace memory;
  const int64_t tile_bytes = Tile::bytes(tiling.rows, p.hidden, p.out, weights.projected);
  if (!memory.allocate(weights.bytes() + tiling.teams() * tile_bytes)) return out_of_memory;
  weights.take(memory);
  char* tile_memory = memory.take<char>(tiling.teams() * tile_bytes);
  Counter counter;

  parallel(tiling.threads, tiling.together, [&](Team& team) {
    weights.pack(team, static_cast<const T*>(p.w_hh), static_cast<const T*>(p.w_hr));
    team.sync();
    for_each_tile(team, tiling, lanes, counter, [&](Team& own, int64_t first, int64_t n, int64_t slot) {
      Tile tile(weights, Outputs<T, Cell>{p}, cell, p.xp, p.h0, p.c0, p.hidden_bias, p.h_init, p.c_init);
      Workspace piece(tile_memory + slot * tile_bytes);
      tile.take(piece, tiling.rows);
      own.sync();   // nobody reads the last tile's runs any more
      for (int64_t r = own.begin(n); r < own.end(n); ++r)
        tile.runs[r] = forward_run(p.lanes, entries[first + r], p.h_init);
      own.sync();
      tile.run(own, n);
    });
  });
  return nullptr;
}

template <class T, class Cell>
const char* scan_forward(const ForwardParams& p, Cell cell, const int64_t* groups, int64_t count,
                         const int64_t* entries, int64_t rows) {
  const auto in = [](const void* x) { return static_cast<const T*>(x); };
  Cascade plan(groups, count, Cell::gates, false, p.threads, rows, p.lanes.steps);
  const CascadeForward<T, Cell, Outputs<T, Cell>> panels{cell,     p.hidden,          in(p.xp),           in(p.h0),
                                                         in(p.c0), in(p.hidden_bias), Outputs<T, Cell>{p}};
  return run_cascade<StateOf<T>>(
      entries, rows, [&](int64_t entry) { return forward_run(p.lanes, entry, false); }, plan, p.hidden,
      [&](const CascadePanel& q) { panels.pack(q, in(p.w_hh)); }, panels);
}

}   // namespace

const char* scanned_forward(const ForwardParams& p, const int64_t* groups, int64_t count, const int64_t* entries,
                            int64_t rows) {
  return dispatch_cell(p.cell, p.cap, [&](auto cell) {
    return p.dtype == BF16 ? scan_forward<bf16>(p, cell, groups, count, entries, rows)
                           : scan_forward<float>(p, cell, groups, count, entries, rows);
  });
}

const char* forward(const ForwardParams& p, const int64_t* entries, int64_t lanes) {
  return dispatch_cell(p.cell, p.cap, [&](auto cell) {
    return p.dtype == BF16                ? run_forward<bf16, bf16>(p, cell, entries, lanes)
           : p.dtype == BF16_WEIGHTS      ? run_forward<float, bf16>(p, cell, entries, lanes)
           : p.dtype == BF16X3 && !p.w_hr ? run_forward<float, Threefold>(p, cell, entries, lanes)
                                          : run_forward<float, float>(p, cell, entries, lanes);
  });
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
