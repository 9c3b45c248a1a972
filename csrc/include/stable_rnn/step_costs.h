// The constants of the model of a step (`step_clocks` in csrc/cuda/recurrence_tiling.cu), by which tilings are chosen and `stable-rnn doctor`
// predicts times. After a measurement `python -m benchmarks.fit_costs ROWS --write` replaces the values, and says where they come from.
#pragma once

namespace stable_rnn {

constexpr const char* step_costs_source = "guessed from published figures, none measured";

struct StepCosts {
  // clocks of one chunk of k, 16 rows of weights and 8 lanes: in one chain of sums, and of an SM's arithmetic
  double chain_scalar = 16;
  double chain_tensor = 66;
  double sum_scalar = 4;
  double sum_tensor = 4;
  // bytes a clock of one SM where all are at work: shared memory, L2, and what it sends to each block of its cluster
  double shared = 128;
  double l2 = 20;
  double sent = 20;
  // clocks of the gates of one cell (a unit of a lane), of cells with one gate and with more, and of sums that warps share
  double cell_plain = 0.25;
  double cell_gated = 0.5;
  double share = 100;
  // clocks of a step whatever its size, of teams that are one block, a cluster (and for each of its blocks), or meet through L2
  double block = 310;
  double cluster = 700;
  double cluster_block = 40;
  double grid = 2750;
};

constexpr const char* step_cost_names[] = {// in the order of the struct
                                           "chain_scalar", "chain_tensor", "sum_scalar",    "sum_tensor", "shared",
                                           "l2",           "sent",         "cell_plain",    "cell_gated", "share",
                                           "block",        "cluster",      "cluster_block", "grid"};
constexpr int step_cost_count = sizeof(step_cost_names) / sizeof(*step_cost_names);
static_assert(sizeof(StepCosts) == step_cost_count * sizeof(double), "a constant without a name");

}   // namespace stable_rnn
