// A tile: N consecutive lanes of the launch's list, which one team runs together; and how a block's warps and memory divide the work.
#pragma once
#include "device.cuh"
#include "stable_rnn/lanes.h"

namespace stable_rnn {

// Made from a CudaTiling (recurrence_tiling.cu). Offsets and sizes in bytes; the offsets are into shared memory, where the weights lie first.
struct Geometry {
  int blocks, cluster, teams, place, product;
  int lanes, units;     // N of a tile, U of a block
  int groups;           // of units, see WarpLayout
  int octets;           // of 8 lanes that a warp has
  int chunks;           // of k in a warp's product
  int segment, pitch;   // of a gate's k in a lane's state; from lane to lane
  int buffers;          // of the state: two taken in turn; one where it comes through L2
  int state, outbox, sums, spans, runs, resets, barriers;
  int outbox_of_warp;
  int brought;       // of a step, to each block of a cluster that meets by transactions; else 0
  int64_t weights;   // of a block, in fragment order
  int64_t shared_bytes;
};

enum Exchange : int { by_barrier = 0, by_transactions = 1 };
enum Product : int { by_mma = 0, by_wgmma = 1 };
enum Place : int { in_registers = 0, in_shared = 1, in_l2 = 2 };

// What a step needs of a Run, in one read.
struct alignas(16) Span {
  int64_t first;
  int warm, steps;
};

// Steps of the lanes of a tile, of those that have any.
struct Extent {
  int least, most;
};

__device__ __forceinline__ int64_t row_at(const Span& span, int s, int64_t move) { return span.first + s * move; }

// The lanes of the tile at hand, in shared memory.
struct TileLanes {
  Span* spans;
  Run* runs;
  bool* resets;   // [4][n] of steps s modulo 4: the state is zero before the lane's step
  int n;
  bool cluster;   // the team is one

  explicit __device__ __forceinline__ TileLanes(const Geometry& g)
      : spans(reinterpret_cast<Span*>(shared_memory() + g.spans)),
        runs(reinterpret_cast<Run*>(shared_memory() + g.runs)),
        resets(reinterpret_cast<bool*>(shared_memory() + g.resets)), n(g.lanes), cluster(g.cluster > 1) {}

  // `entries`: of the whole list; beyond it are lanes with no steps.
  template <bool backward>
  __device__ __forceinline__ Extent load(const Lanes& lanes, int64_t first, int64_t entries, bool from_init) const {
    // A cluster's barrier opens once all have arrived: some warps may still write what the tile before ended with.
    if (cluster) block_sync();
    for (int i = thread_index(); i < n; i += thread_count()) {
      Run run{};
      if (first + i < entries)
        run = backward ? backward_run(lanes, first + i, from_init) : forward_run(lanes, first + i, from_init);
      runs[i] = run;
      spans[i] = {run.first, static_cast<int>(run.warm), static_cast<int>(run.steps)};
    }
    block_sync();
    Extent extent{0, 0};
    for (int i = 0; i < n; ++i) {
      const int steps = spans[i].steps;
      if (steps > extent.most) extent.most = steps;
      if (steps && (steps < extent.least || extent.least == 0)) extent.least = steps;
    }
    if (lanes.resets) {
      load_resets<backward>(lanes, 0);
      load_resets<backward>(lanes, 1);
      block_sync();
    }
    return extent;
  }

  // Once all have arrived at a later barrier of the team, resets of step s are known, until step s + 2 is.
  template <bool backward>
  __device__ __forceinline__ void load_resets(const Lanes& lanes, int s) const {
    if (!lanes.resets) return;
    for (int i = thread_index(); i < n; i += thread_count())
      resets[(s & 3) * n + i] =
          s < spans[i].steps && lanes.resets[row_at(spans[i], s, backward ? -lanes.step : lanes.step)];
  }

  // Whether the state is zero before a lane's step.
  __device__ __forceinline__ bool begins_anew(const Lanes& lanes, int lane, int s) const {
    return lanes.resets && resets[(s & 3) * n + lane];
  }
};

// What a lane starts from: the caller's state of its row, or `init` of its entry, else zero.
template <class Storage>
__device__ __forceinline__ float start_value(const Run& run, const void* given, const float* init, int size, int unit) {
  if (init) return init[run.entry * size + unit];
  return run.given && given ? static_cast<float>(static_cast<const Storage*>(given)[run.b * size + unit]) : 0.f;
}

// One more forget gate of a unit times its lane's decay so far, which stands where the caller wants it: only this thread touches it there.
// Over a step before which the state is zero nothing passes.
__device__ __forceinline__ void multiply_decay(float* decay, bool first, bool anew, float forget) {
  *decay = anew ? 0.f : decayed(first ? 1.f : *decay, forget);
}

}   // namespace stable_rnn
