// Lanes as runs: where a lane's data lie and what it starts from, in visiting order, forward or backward in time (see params.h).
#pragma once
#include <cstdint>

#include "stable_rnn/cell.h"
#include "stable_rnn/params.h"

namespace stable_rnn {

struct Run {
  int64_t id, entry;     // lane id j * batch + b; its place in `select`, or the id
  int64_t b;             // row of the batch
  int64_t first, move;   // buffer row of step 0, and from one step to the next
  int64_t steps, warm;   // steps in all, and before the first that writes
  int64_t stages;        // steps; backward one more, in which the last step's adjoint goes on to the time before
  bool
      given;   // starts at the row's own start (backward: end), from the caller's state; else from zeros or from `init`
  bool last;   // ends at the row's own end (backward: start)
};

STABLE_RNN_HD int64_t length_of(const Lanes& lanes, int64_t b) { return lanes.length ? lanes.length[b] : lanes.steps; }

STABLE_RNN_HD int64_t row_of(const Lanes& lanes, int64_t b, int64_t t) {
  const int64_t base = lanes.base ? lanes.base[b] : lanes.step < 0 ? (lanes.steps - 1) * lanes.batch + b : b;
  return base + t * lanes.step;
}

// No steps where the row ends before the lane.
STABLE_RNN_HD Run forward_run(const Lanes& lanes, int64_t entry, bool from_init) {
  Run run{};
  run.entry = entry;
  run.id = lanes.select ? lanes.select[entry] : entry;
  run.b = run.id % lanes.batch;
  const int64_t length = length_of(lanes, run.b), write = run.id / lanes.batch * lanes.stride;
  if (write >= length) return run;
  const int64_t warm = from_init ? 0 : write < lanes.warmup ? write : lanes.warmup;
  const int64_t end = length - write < lanes.stride ? length : write + lanes.stride;
  run.first = row_of(lanes, run.b, write - warm);
  run.move = lanes.step;
  run.warm = warm;
  run.steps = run.stages = end - write + warm;
  run.given = !from_init && write <= lanes.warmup;
  run.last = end == length;
  return run;
}

STABLE_RNN_HD Run backward_run(const Lanes& lanes, int64_t entry, bool from_init) {
  Run run{};
  run.entry = entry;
  run.id = lanes.select ? lanes.select[entry] : entry;
  run.b = run.id % lanes.batch;
  const int64_t length = length_of(lanes, run.b), write = run.id / lanes.batch * lanes.stride;
  if (write >= length) return run;
  const int64_t end = length - write < lanes.stride ? length : write + lanes.stride;
  const int64_t warm = from_init ? 0 : length - end < lanes.warmup ? length - end : lanes.warmup;
  run.first = row_of(lanes, run.b, end + warm - 1);
  run.move = -lanes.step;
  run.warm = warm;
  run.steps = end - write + warm;
  run.stages = run.steps + 1;
  run.given = !from_init && end + warm == length;
  run.last = write == 0;
  return run;
}

// A window, which runs forward and back: only from time 0 is there an adjoint to carry on to the start.
STABLE_RNN_HD Run window_run(const Lanes& lanes, int64_t id, bool) {
  Run run = forward_run(lanes, id, false);
  run.stages = run.steps + run.given;
  return run;
}

// At most so many steps has a lane.
STABLE_RNN_HD int64_t most_steps(const Lanes& lanes) {
  return lanes.steps - lanes.warmup > lanes.stride ? lanes.stride + lanes.warmup : lanes.steps;
}

STABLE_RNN_HD int64_t lanes_per_row(const Lanes& lanes) {
  return lanes.steps ? (lanes.steps - 1) / lanes.stride + 1 : 0;
}

}   // namespace stable_rnn
