// How lanes become tiles and tiles meet threads, and the memory that tiles work in.
#pragma once
#include <cstdlib>

#include "gemm.h"
#include "lanes.h"
#include "memory.h"
#include "parallel.h"
#include "stable_rnn/cell.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

// Many lanes: every thread runs tiles of its own, and reads all weights at each step. Few: all threads run one tile together, each
// with its share of the hidden units, so of the weights, and meet after each step.
struct Tiling {
  int threads;
  bool together;
  int64_t rows, count;   // of a tile (the last may have fewer), tiles

  // `weights`: their number, which is also the multiply-adds of a lane's step.
  Tiling(int wanted, int64_t lanes, int64_t steps, int64_t hidden, int64_t weights) : threads(wanted < 1 ? 1 : wanted) {
    constexpr int64_t worth_a_start = 100000;   // multiply-adds in all that pay for waking a thread
    constexpr int64_t worth_a_thread = 16000;   // of a step, against the wait for the others
    constexpr int64_t cached = 65536;           // weights that stay in the cache of a core beside a tile
    constexpr int64_t most_rows = 16 * block_rows;
    const double useful_starts = double(lanes) * double(steps) * double(weights) / worth_a_start;
    if (useful_starts < threads) threads = useful_starts < 1 ? 1 : int(useful_starts);
    const int64_t vectors = ceil_div(hidden, width), turns = ceil_div(vectors, threads);
    const bool even = 5 * vectors >= 4 * turns * threads;   // of units, over the threads
    const int64_t own_rows =
        weights > cached && even ? 8 * block_rows : block_rows / 2;   // that make a thread's own tile worthwhile
    together = lanes < own_rows * threads;
    if (together) {
      const int64_t useful = lanes * weights / worth_a_thread;
      if (useful < threads) threads = useful < 1 ? 1 : int(useful);
      if (vectors < threads) threads = int(vectors);
      threads = uncrowded(threads);
      together = threads > 1;
    }
    const int64_t share =
        together ? lanes : ceil_div(lanes, threads);   // evenly: no thread waits long for the last tile
    rows = share ? ceil_div(share, ceil_div(share, most_rows)) : 1;
    count = ceil_div(lanes, rows);
  }
  int panel_threads() const { return together ? threads : 1; }
  bool few() const { return rows <= few_rows; }
  int64_t teams() const { return together ? 1 : threads; }
};

// Memory for a call: one block, handed out in pieces that start on cache lines.
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(char* borrowed) : next_(borrowed) {}   // on a cache line
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(block_); }

  bool allocate(int64_t bytes) {
    block_ = static_cast<char*>(std::malloc(bytes + line));
    if (block_) prefer_huge_pages(block_, bytes + line);
    next_ = block_ + (line - reinterpret_cast<uintptr_t>(block_) % line);
    return block_ != nullptr;
  }
  template <class T>
  T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(n);
    return piece;
  }
  template <class T>
  static int64_t bytes(int64_t n) {
    return round_up(n * int64_t(sizeof(T)), line);
  }

 private:
  static constexpr int64_t line = 64;
  char* block_ = nullptr;
  char* next_ = nullptr;
};

// Elements from one row of a tile's state to the next: room for whole vectors, and rows do not all fall on the same cache sets.
constexpr int64_t state_stride(int64_t n) { return round_up(n, 16) + 16; }

// A row of n state values from the caller's, or else from `init`, or else zeros.
template <class S, class T>
STABLE_RNN_INLINE void begin_state(S* state, int64_t n, const T* given, const float* init) {
  for (int64_t u = 0; u < n; u += width)
    store(state + u, given ? load(given + u, n - u) : init ? load(init + u, n - u) : Vec(0.f));
}

// The forget gates of a lane's units times their decay so far, which stands where the caller wants it.
STABLE_RNN_INLINE void multiply_decay(float* decay, bool first, Vec forget, int64_t n) {
  store(decay, decayed(first ? Vec(1.f) : load(decay, n), forget), n);
}

// body(p) for this thread's panels, at step s: in turn upwards and downwards, so that what the cache still holds from the end of one
// step begins the next.
template <class W, class Body>
STABLE_RNN_INLINE void each_panel(const Team& team, const Panels<W>& panels, int64_t s, const Body& body) {
  const int64_t begin = team.begin(panels.count), end = team.end(panels.count);
  for (int64_t i = begin; i < end; ++i) body(s % 2 ? begin + end - 1 - i : i);
}

// run(team, first, n, slot) for each tile of lanes [first, first + n), with slot < tiling.teams() naming its memory.
template <class RunTile>
STABLE_RNN_INLINE void for_each_tile(Team& team, const Tiling& tiling, int64_t lanes, Counter& counter,
                                     const RunTile& run) {
  const auto rows = [&](int64_t tile) {
    return lanes - tile * tiling.rows < tiling.rows ? lanes - tile * tiling.rows : tiling.rows;
  };
  if (tiling.together)
    for (int64_t tile = 0; tile < tiling.count; ++tile) run(team, tile * tiling.rows, rows(tile), 0);
  else
    for (int64_t tile; (tile = counter.next()) < tiling.count;) {
      Team alone;
      run(alone, tile * tiling.rows, rows(tile), team.rank);
    }
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
