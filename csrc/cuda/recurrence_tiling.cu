// How a problem is divided: blocks of a team, units of a block, lanes of a tile, where the weights stay. Every division gives the same
// bits, so the choice is free: the least time for all lanes by a simple model of one SM, in clocks.
#include <cstdlib>
#include <cstring>

#include "recurrence_launch.h"

namespace stable_rnn {
namespace {

constexpr int64_t most_hidden = 1 << 14;   // beyond what shared memory takes; sizes of a block in bytes fit in int

double larger(double a, double b) { return a > b ? a : b; }

// One step of one tile.
double tile_clocks(bool backward, int cell, int dtype, const CudaTiling& tiling, const Geometry& g,
                   const StepCosts& c) {
  const WarpLayout layout = warp_layout(backward, cell);
  const bool tensor = dtype != F32;
  const double element = product_shape(dtype).element,
               quads = product_shape(dtype).fragments * 16;   // a warp's read of 8 rows
  const double rows = layout.blocks, cells = double(tiling.lanes) * tiling.units;
  const double chunks = double(tiling.warps) * g.chunks;   // of all warps

  double product = g.chunks * (tensor ? c.chain_tensor : c.chain_scalar);
  product = larger(product, chunks * rows * g.octets * (tensor ? c.sum_tensor : c.sum_scalar));
  const double readers = g.product == by_wgmma ? chunks / 4 : chunks;   // a warpgroup reads states once
  const double weights = chunks * rows * 2 * quads, states = readers * g.octets * (tensor ? 512 : 256);
  product = larger(product, (states + (tiling.place == in_shared ? weights : 0)) / c.shared);
  if (tiling.place == in_l2) product = larger(product, weights / c.l2);

  const double gates = cells * (layout.gates > 1 ? c.cell_gated : c.cell_plain) +
                       (layout.warps > 1 ? c.share + cells * 8 * layout.warps / c.shared : 0);
  const double sent = cells * element * layout.parts;
  const double meeting = tiling.blocks == 1   ? c.block
                         : tiling.cluster > 1 ? c.cluster + (c.cluster_block + sent / c.sent) * tiling.blocks
                                              : c.grid + double(tiling.lanes) * g.pitch / c.l2;
  return product + gates + meeting;
}

// Teams that run at the same time, one block on an SM. The blocks of a cluster share a part of the chip, of at least 16 SMs; those of a grid
// all have to run.
int64_t teams_at_once(const CudaTiling& tiling, int64_t sms) {
  const int64_t parts = sms / 16;
  return tiling.cluster == 1 || parts == 0 ? sms / tiling.blocks : parts * (16 / tiling.blocks);
}

// One step of all lanes.
double step_clocks(bool backward, int cell, int dtype, int64_t entries, const CudaTiling& tiling, const Geometry& g,
                   int64_t sms, const StepCosts& costs) {
  const int64_t tiles = ceil_div(entries, tiling.lanes);
  return ceil_div(tiles, teams_at_once(tiling, sms)) * tile_clocks(backward, cell, dtype, tiling, g, costs);
}

struct Problem {
  int backward, cell, dtype, arch, sms, max_cluster;
  int64_t shared_bytes, hidden, entries;
  bool wgmma;

  bool operator==(const Problem& p) const {
    return backward == p.backward && cell == p.cell && dtype == p.dtype && arch == p.arch && sms == p.sms &&
           max_cluster == p.max_cluster && shared_bytes == p.shared_bytes && hidden == p.hidden &&
           entries == p.entries && wgmma == p.wgmma;
  }
};

// Goes through all divisions that the device and the kernels allow.
struct Search : Problem {
  const WarpLayout layout;
  CudaTiling best{};

  explicit Search(const Problem& problem) : Problem(problem), layout(warp_layout(backward, cell)) {}

  void consider(int blocks, int cluster, int units, int octets, int lane_groups, int place) {
    const int warps = units / layout.units * layout.warps * lane_groups;
    const int most = most_warps(layout, octets, place == in_registers);
    if (warps > most) return;
    if (!is_compiled(layout, product_shape(dtype).element, octets, place == in_registers)) return;
    if (place == in_registers && lane_groups > 1) return;
    const bool grouped = wgmma && takes_wgmma(layout, product_shape(dtype).element, octets) &&
                         units / layout.units % 4 == 0;   // warps that share lanes, by four
    CudaTiling tiling{nullptr, blocks, cluster, 8 * octets * lane_groups,    units,     warps, place, 1,
                      0,       0,      0,       grouped ? by_wgmma : by_mma, by_barrier};
    Geometry g = geometry_of(backward, cell, dtype, hidden, tiling);
    if (g.shared_bytes > shared_bytes || (place == in_registers && g.chunks > held_chunks)) return;

    tiling.clocks = step_clocks(backward, cell, dtype, entries, tiling, g, sms, StepCosts{});
    if (best.blocks && tiling.clocks >= best.clocks) return;
    const int64_t tiles = ceil_div(entries, tiling.lanes), fit = teams_at_once(tiling, sms);
    const bool grid = blocks > 1 && cluster == 1;   // other small blocks share an SM
    const int64_t by_memory = (shared_bytes + 1024) / (g.shared_bytes + 1024), by_registers = most / warps;
    const int64_t together = grid ? fit : fit * (by_memory < by_registers ? by_memory : by_registers);
    tiling.teams = static_cast<int>(tiles < together ? tiles : together);
    g.teams = tiling.teams;
    tiling.shared_bytes = g.shared_bytes;
    tiling.workspace_bytes = workspace_parts(tiling, g).bytes;
    best = tiling;
  }

  void each_tile(int blocks, int cluster, int units) {
    for (int octets = 1; octets <= 8; octets *= 2)
      for (int lane_groups = 1; lane_groups <= 8; lane_groups *= 2)
        for (int place = in_registers; place <= in_l2; ++place)
          consider(blocks, cluster, units, octets, lane_groups, place);
  }

  CudaTiling run() {
    const int step = layout.units;
    for (int blocks = 1; blocks <= max_cluster && blocks <= sms; blocks *= 2) {
      const int64_t units = round_up(ceil_div(hidden, blocks), step);
      if ((blocks - 1) * units < hidden)
        each_tile(blocks, blocks, static_cast<int>(units));   // no block without a unit
    }
    for (int units = step; units <= 16 * step; units += step) {
      const int64_t blocks = ceil_div(hidden, units);
      if (blocks > 1 && blocks <= sms) each_tile(static_cast<int>(blocks), 1, units);
    }
    return best;
  }
};

// Searches take microseconds and calls repeat themselves: the last few answers are kept.
CudaTiling recent(const Problem& problem) {
  constexpr int kept = 16;
  static thread_local struct {
    Problem problem;
    CudaTiling tiling;
  } known[kept];
  static thread_local unsigned oldest = 0;
  for (const auto& k : known)
    if (k.problem == problem) return k.tiling;
  auto& k = known[oldest++ % kept];
  k.tiling = problem.hidden > most_hidden ? CudaTiling{} : Search{problem}.run();
  k.problem = problem;
  return k.tiling;
}

// Between the default and another way, by an environment variable that is read anew for each call.
enum Choice { usual, chosen, unknown };
Choice choice(const char* variable, const char* usually, const char* other) {
  const char* const value = std::getenv(variable);
  if (!value || !*value || std::strcmp(value, usually) == 0) return usual;
  return std::strcmp(value, other) == 0 ? chosen : unknown;
}

CudaTiling refuse(const char* message) {
  CudaTiling tiling{};
  tiling.message = message;
  return tiling;
}

}   // namespace

Geometry geometry_of(bool backward, int cell, int dtype, int64_t hidden, const CudaTiling& tiling) {
  const ProductShape shape = product_shape(dtype);
  const WarpLayout layout = warp_layout(backward, cell);
  Geometry g{};
  g.blocks = tiling.blocks;
  g.cluster = tiling.cluster;
  g.teams = tiling.teams;
  g.place = tiling.place;
  g.product = tiling.product;
  g.lanes = tiling.lanes;
  g.units = tiling.units;
  g.groups = tiling.units / layout.units;
  const int warps_of_lanes = g.groups * layout.warps;
  g.octets = tiling.lanes / 8 / (tiling.warps / warps_of_lanes);

  const int chunks = static_cast<int>(ceil_div(hidden * shape.element, shape.chunk));
  g.chunks = chunks * layout.own_gates;
  g.segment = chunks * shape.chunk;
  const int pitch = layout.parts * g.segment / shape.pitch_unit;
  g.pitch = (pitch % 2 || g.product == by_wgmma ? pitch : pitch + 1) * shape.pitch_unit;
  g.buffers = tiling.blocks > 1 && tiling.cluster == 1 ? 1 : 2;

  g.weights = int64_t(warps_of_lanes) * layout.blocks * g.chunks * 2 * shape.fragments * 16;
  g.outbox_of_warp = 8 * g.octets * layout.own_gates * layout.units * shape.element;
  const int64_t sums = backward ? int64_t(tiling.warps) * g.octets * 16 * 9 * 4 : 0;
  int64_t at = tiling.place == in_shared ? g.weights : 0;
  const auto next = [&at](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 16);
    return static_cast<int>(here);
  };
  g.state = next(int64_t(g.buffers) * g.lanes * g.pitch);
  g.outbox = next(int64_t(tiling.warps) * g.outbox_of_warp);
  g.sums = next(sums);
  g.spans = next(g.lanes * int64_t(sizeof(Span)));
  g.runs = next(g.lanes * int64_t(sizeof(Run)));
  g.resets = next(4 * g.lanes);
  g.barriers = next(g.cluster > 1 ? 16 : 0);
  g.shared_bytes = at;
  const int64_t columns =
      int64_t(g.blocks) * g.units * shape.element;   // of a gate, that warps have; see send() of the kernels
  if (g.cluster > 1 && tiling.exchange == by_transactions)
    g.brought = g.lanes * layout.parts * static_cast<int>(columns < g.segment ? columns : g.segment);
  return g;
}

const char* wgmma_problem(bool backward, int cell, int dtype, const CudaTiling& tiling, const Geometry& g) {
  if (!takes_wgmma(warp_layout(backward, cell), product_shape(dtype).element, g.octets) || tiling.place == in_registers)
    return "wgmma is for forward passes of 16-bit types with 32 or 64 lanes a warp";
  if (g.groups % 4) return "wgmma needs a multiple of four warps with the same lanes";
  if (g.brought) return "wgmma does not go together with transactions";
  return nullptr;
}

WorkspaceParts workspace_parts(const CudaTiling& tiling, const Geometry& g) {
  WorkspaceParts parts;
  parts.flags = round_up(tiling.blocks * g.weights, 256);
  const bool grid = tiling.blocks > 1 && tiling.cluster == 1;
  parts.inboxes = parts.flags + (grid ? round_up(int64_t(tiling.teams) * tiling.blocks * 4, 256) : 0);
  parts.bytes = parts.inboxes + (grid ? int64_t(tiling.teams) * 2 * g.lanes * g.pitch : 0);
  return parts;
}

CudaTiling recurrence_tiling_cuda(bool backward, int cell, int dtype, int64_t hidden, int64_t out, int64_t entries,
                                  const CudaLimits& limits) {
  if (!is_cell(cell)) return refuse(unknown_cell);
  if (dtype < F32 || dtype > TF32) return refuse("dtype must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (TF32)");
  if (limits.arch < 80) return refuse("the CUDA kernels need compute capability 8.0 or later");
  if (out != hidden) return refuse("the CUDA kernels take no projection of the state (w_hr, proj_size)");
  if (hidden < 0) return refuse("hidden must not be negative");
  if (hidden == 0) return CudaTiling{};
  const Choice transactions = choice("STABLE_RNN_EXCHANGE", "barrier", "transactions"),
               wgmma = choice("STABLE_RNN_PRODUCT", "mma", "wgmma");
  if (transactions == unknown)
    return refuse("the environment variable STABLE_RNN_EXCHANGE must be barrier or transactions");
  if (wgmma == unknown) return refuse("the environment variable STABLE_RNN_PRODUCT must be mma or wgmma");
  if (wgmma == chosen && transactions == chosen)
    return refuse("STABLE_RNN_PRODUCT=wgmma does not go together with STABLE_RNN_EXCHANGE=transactions");
  CudaTiling tiling =
      recent(Problem{backward, cell, dtype, limits.arch, limits.sms, limits.max_cluster, limits.shared_bytes, hidden,
                     entries < 1 ? 1 : entries, wgmma == chosen && limits.arch == 90});
  if (tiling.cluster > 1 && transactions == chosen) tiling.exchange = by_transactions;
  return tiling.blocks
             ? tiling
             : refuse("hidden is too large: the states of eight lanes do not fit into the shared memory of a block");
}

double step_clocks_cuda(bool backward, int cell, int dtype, int64_t hidden, int64_t entries, const CudaTiling& tiling,
                        const CudaLimits& limits, const StepCosts& costs) {
  constexpr double none = -1;
  if (!is_cell(cell) || dtype < F32 || dtype > TF32 || hidden < 1 || hidden > most_hidden) return none;
  const WarpLayout layout = warp_layout(backward, cell);
  if (tiling.blocks < 1 || tiling.blocks > limits.sms || tiling.units < layout.units || tiling.units % layout.units)
    return none;
  if (tiling.cluster != 1 && (tiling.cluster != tiling.blocks || tiling.blocks > 16)) return none;
  const int warps = tiling.units / layout.units * layout.warps;   // of each group of lanes
  if (tiling.warps < warps || tiling.warps % warps || tiling.lanes < 8) return none;
  const Geometry g = geometry_of(backward, cell, dtype, hidden, tiling);
  return step_clocks(backward, cell, dtype, entries < 1 ? 1 : entries, tiling, g, limits.sms, costs);
}

}   // namespace stable_rnn
