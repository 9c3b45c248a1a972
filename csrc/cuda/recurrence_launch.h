// Between the entry points (recurrence.cu), the choice of a tiling (recurrence_tiling.cu) and the kernels (recurrence_*_*.cu).
#pragma once
#include "recurrence_layout.h"
#include "stable_rnn/cuda.h"
#include "team.cuh"

namespace stable_rnn {

template <class Params>
struct RecurrenceLaunch {
  Params p;
  Geometry geometry;
  Meeting meeting;
  const Quad* weights;   // packed
  int64_t entries;       // of the list of lanes
};
using ForwardLaunch = RecurrenceLaunch<ForwardParams>;
using BackwardLaunch = RecurrenceLaunch<BackwardParams>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// From the tiling's blocks, cluster, lanes, units, warps, place and teams.
Geometry geometry_of(bool backward, int cell, int dtype, int64_t hidden, const CudaTiling& tiling);

// Null, or why no kernel multiplies by wgmma in this way.
const char* wgmma_problem(bool backward, int cell, int dtype, const CudaTiling& tiling, const Geometry& g);

// The workspace: packed weights; then, where teams meet through L2, flags and inboxes (see Meeting), which are zeroed together.
struct WorkspaceParts {
  int64_t flags, inboxes, bytes;
};
WorkspaceParts workspace_parts(const CudaTiling& tiling, const Geometry& g);

// The entry points with a tiling of the caller's choice: so tests reach every variant.
const char* recurrence_forward_tiled(const ForwardParams&, const CudaTiling&, const CudaLaunch&);
const char* recurrence_backward_tiled(const BackwardParams&, const CudaTiling&, const CudaLaunch&);

template <int dtype> const char* launch_forward(const ForwardLaunch&, const Grid&);
template <int dtype> const char* launch_forward_wgmma(const ForwardLaunch&, const Grid&);   // 16-bit types
template <int dtype> const char* launch_backward(const BackwardLaunch&, const Grid&);

}   // namespace stable_rnn
