// The entry points: what the CUDA kernels cannot do, the tiling, and the two launches (prepare, then the recurrence).
#include "recurrence_weights.cuh"
#include "recurrence_launch.h"

namespace stable_rnn {
namespace {

template <class Params>
const char* check(const Params& p) {
  if (!(p.cap > 0 && p.cap <= 1)) return "cap must lie in (0, 1]";
  const Lanes& lanes = p.lanes;
  if (lanes.steps < 0 || lanes.batch < 0 || lanes.stride < 1 || lanes.warmup < 0 || lanes.n_select < 0)
    return "steps, batch, warmup and n_select must not be negative, and stride must be positive";
  if (lanes.steps >= (int64_t(1) << 31) - 1) return "the CUDA kernels take at most 2^31 - 2 steps";
  if (p.w_hr) return "the CUDA kernels take no projection of the state (w_hr, proj_size)";
  return nullptr;
}

int64_t entries_of(const Lanes& lanes) { return lanes.select ? lanes.n_select : lanes_per_row(lanes) * lanes.batch; }

// What differs between the directions: where the states of a row without time come from and go to, and the kernels.
void hand_through(const ForwardParams& p, PrepareParams& q) {
  q.h_from = p.h0, q.h_to = p.h_n;
  if (has_cell(p.cell)) q.c_from = p.c0, q.c_to = p.c_n;
}
void hand_through(const BackwardParams& p, PrepareParams& q) {
  q.h_from = p.dh_n, q.h_to = p.dh0;
  if (has_cell(p.cell)) q.c_from = p.dc_n, q.c_to = p.dc0;
}
template <int dtype> const char* launch_recurrence(const ForwardLaunch& q, const Grid& grid) {
  if constexpr (dtype == BF16 || dtype == F16)
    if (q.geometry.product == by_wgmma) return launch_forward_wgmma<dtype>(q, grid);
  return launch_forward<dtype>(q, grid);
}
template <int dtype> const char* launch_recurrence(const BackwardLaunch& q, const Grid& grid) {
  return launch_backward<dtype>(q, grid);
}

template <int dtype, class Params>
const char* enqueue(bool backward, const Params& p, const CudaTiling& tiling, const CudaLaunch& at) {
  const int64_t entries = entries_of(p.lanes);
  const Geometry g = geometry_of(backward, p.cell, dtype, p.hidden, tiling);
  if (tiling.product == by_wgmma)
    if (const char* problem = wgmma_problem(backward, p.cell, dtype, tiling, g)) return problem;
  const WorkspaceParts parts = workspace_parts(tiling, g);
  char* workspace = static_cast<char*>(at.workspace);
  if (entries > 0 && at.workspace_bytes < parts.bytes) return "the workspace is smaller than the tiling says";

  PrepareParams q{};
  q.geometry = g;
  q.lanes = p.lanes;
  q.layout = warp_layout(backward, p.cell);
  q.hidden = p.hidden;
  q.w_hh = p.w_hh;
  hand_through(p, q);
  if (p.lanes.length || p.lanes.steps == 0) q.empty_rows = p.lanes.batch;
  if (entries > 0) {
    q.packed = reinterpret_cast<Quad*>(workspace);
    q.quads = tiling.blocks * g.weights / 16;
    q.meeting = reinterpret_cast<Quad*>(workspace + parts.flags);
    q.meeting_quads = (parts.bytes - parts.flags) / 16;
  }
  const int64_t work = q.quads + q.meeting_quads + q.empty_rows * q.hidden, blocks = ceil_div(work, 256);
  if (work == 0) return nullptr;
  const Grid small{static_cast<int>(blocks < 1024 ? blocks : 1024), 256, 1, 0, false, at.stream};
  if (const char* problem = launch(&prepare<dtype>, small, q)) return problem;
  if (entries == 0) return nullptr;

  const bool grid = tiling.blocks > 1 && tiling.cluster == 1;
  const Meeting meeting{workspace + parts.inboxes, reinterpret_cast<unsigned*>(workspace + parts.flags)};
  return launch_recurrence<dtype>(
      RecurrenceLaunch<Params>{p, g, meeting, q.packed, entries},
      Grid{tiling.teams * tiling.blocks, 32 * tiling.warps, tiling.cluster, g.shared_bytes, grid, at.stream});
}

template <class Params>
const char* run(bool backward, const Params& p, const CudaTiling& tiling, const CudaLaunch& at) {
  if (const char* problem = check(p)) return problem;
  if (tiling.message) return tiling.message;
  if (p.hidden == 0) return nullptr;
  return with_device(at.device, [&]() -> const char* {
    switch (p.dtype) {
      case F32:
        return enqueue<F32>(backward, p, tiling, at);
      case BF16:
        return enqueue<BF16>(backward, p, tiling, at);
      case F16:
        return enqueue<F16>(backward, p, tiling, at);
      default:
        return enqueue<TF32>(backward, p, tiling, at);
    }
  });
}

template <class Params>
const char* tile_and_run(bool backward, const Params& p, const CudaLaunch& at) {
  CudaLimits limits;
  if (const char* problem = check(p)) return problem;
  if (const char* problem = cuda_limits(at.device, &limits)) return problem;
  return run(backward, p,
             recurrence_tiling_cuda(backward, p.cell, p.dtype, p.hidden, p.out, entries_of(p.lanes), limits), at);
}

}   // namespace

const char* recurrence_forward_tiled(const ForwardParams& p, const CudaTiling& tiling, const CudaLaunch& at) {
  return run(false, p, tiling, at);
}
const char* recurrence_backward_tiled(const BackwardParams& p, const CudaTiling& tiling, const CudaLaunch& at) {
  return run(true, p, tiling, at);
}
const char* recurrence_forward_cuda(const ForwardParams& p, const CudaLaunch& at) { return tile_and_run(false, p, at); }
const char* recurrence_backward_cuda(const BackwardParams& p, const CudaLaunch& at) {
  return tile_and_run(true, p, at);
}

}   // namespace stable_rnn
