// The uncertified spectral step on a GPU: all matrices in one launch. csrc/cuda/SPECTRAL.md has the numbers, spectral_step.cuh the work.
#include <algorithm>

#include "spectral_step.cuh"

namespace stable_rnn {
namespace spectral {
namespace {

__global__ void __launch_bounds__(THREADS, 1) spectral_step(const Params p) {
  Team team(p);
  Step(p, team).run();
}

struct Flags {
  unsigned* flags;
  int count;
};
__global__ void __launch_bounds__(256) lower(const Flags f) {
  for (int i = thread_index(); i < f.count; i += thread_count()) f.flags[i] = 0;
}

constexpr int LARGEST_TEAM = 16;   // that a cluster can be
constexpr int ROWS = 32;           // of W that a block should have: with fewer, the meetings take longer than the work
constexpr int64_t MUCH =
    1 << 15;   // weights of a block of a cluster beyond which a larger team, meeting through flags, is faster

template <class T>
T round_up(T a, T unit) {
  return (a + unit - 1) / unit * unit;
}

int64_t wanted_blocks(int64_t rows) { return rows <= 2 * ROWS ? 1 : (rows + ROWS - 1) / ROWS; }

// As many of `most` blocks as the rows want; in a cluster a power of two, as `most` is.
int own_blocks(int64_t rows, int most, bool cluster) {
  const int64_t wanted = std::min<int64_t>(wanted_blocks(rows), most);
  int blocks = 1;
  while (blocks < wanted) blocks *= 2;
  return cluster ? blocks : static_cast<int>(wanted);
}

// Prefers W to stay; then X and the sums of W^T Y in shared memory; then tiles that come while others are worked on. False: too wide.
bool lay_out(const SpectralMatrix& a, int team, bool cluster, int64_t shared_bytes, Layout* layout) {
  const int64_t rows = a.rows, cols = a.cols;
  const int blocks = own_blocks(rows, team, cluster);
  const int share = static_cast<int>(std::max<int64_t>(1, (rows + blocks - 1) / blocks));
  if (cols > 1 << 20) return false;
  const int pitch = static_cast<int>(round_up<int64_t>(cols, 32)), whole = round_up(share, 16);
  const struct {
    int tile, buffers;
    bool x, z;
  } tries[] = {{whole, 1, true, false}, {32, 2, true, true},  {16, 2, true, true},
               {16, 1, true, true},     {16, 1, true, false}, {16, 1, false, false}};
  for (const auto& t : tries) {
    *layout = {blocks, share, t.tile, (share + t.tile - 1) / t.tile, pitch, t.buffers, t.x, t.z};
    if (Shared(*layout).bytes <= shared_bytes) return true;
  }
  return false;
}

struct Tiling {
  const char* message = nullptr;
  int blocks = 1;
  bool cluster = false;
  int64_t shared_bytes = 0, flags = 0, workspace_bytes = 0;
  Space space{};
};

Tiling tiling(const SpectralParams& p, const CudaLimits& limits) {
  Tiling tiling;
  int64_t rows = 1, cols = 1;
  for (int64_t i = 0; i < p.count; ++i) {
    const SpectralMatrix& a = p.matrices[i];
    if (a.dtype != F32 && a.dtype != BF16 && a.dtype != F16)
      tiling.message = "dtype of a matrix: float32, bfloat16 or float16";
    if (a.width < 0 || a.width > K) tiling.message = "a block has more than 16 vectors";
    if (a.rows > INT32_MAX - 1024) tiling.message = "a matrix has too many rows for the CUDA kernel";
    rows = std::max<int64_t>(rows, a.rows);
    cols = std::max<int64_t>(cols, a.cols);
  }
  if (tiling.message) return tiling;

  const int64_t at_once = std::max<int64_t>(1, std::min<int64_t>(p.count, MOST));
  int most = 1;
  while (2 * most <= std::min(limits.max_cluster, LARGEST_TEAM)) most *= 2;
  tiling.blocks = own_blocks(rows, most, true);
  const int64_t larger =
      std::min(wanted_blocks(rows), limits.sms / at_once);   // blocks that wait for each other must all run
  const int64_t share = (rows + tiling.blocks - 1) / tiling.blocks * cols;
  if (larger >= 2 * tiling.blocks && share > MUCH) tiling.blocks = static_cast<int>(larger);
  tiling.cluster = tiling.blocks > 1 && tiling.blocks <= most;

  int64_t pitch = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    Layout layout;
    if (!lay_out(p.matrices[i], tiling.blocks, tiling.cluster, limits.shared_bytes, &layout)) {
      tiling.message = "a matrix has too many columns for the shared memory of this device";
      return tiling;
    }
    tiling.shared_bytes = std::max<int64_t>(tiling.shared_bytes, Shared(layout).bytes);
    pitch = std::max<int64_t>(pitch, layout.pitch);
  }
  int64_t bytes = 0;
  const auto take = [&bytes](int64_t size) {
    return (bytes += round_up<int64_t>(size, 256)) - round_up<int64_t>(size, 256);
  };
  tiling.space.partials = take(4 * K * pitch * tiling.blocks);
  tiling.space.x = take(4 * K * pitch);
  tiling.space.y = take(4 * K * rows);
  tiling.space.grams = take(2 * 8 * K * K * tiling.blocks);
  tiling.space.largest = take(4 * tiling.blocks);
  tiling.space.bytes = bytes;
  tiling.flags = round_up<int64_t>(4 * tiling.blocks * at_once, 256);
  tiling.workspace_bytes = tiling.flags + at_once * bytes;
  return tiling;
}

}   // namespace
}   // namespace spectral

int64_t spectral_workspace_cuda(const SpectralParams& p, const CudaLimits& limits) {
  const spectral::Tiling tiling = spectral::tiling(p, limits);
  return tiling.message ? -1 : tiling.workspace_bytes;
}

const char* spectral_step_cuda(const SpectralParams& p, const CudaLaunch& launched) {
  using namespace spectral;
  CudaLimits limits;
  if (const char* problem = cuda_limits(launched.device, &limits)) return problem;
  const Tiling tiling = spectral::tiling(p, limits);
  if (tiling.message) return tiling.message;
  if (launched.workspace_bytes < tiling.workspace_bytes)
    return "the workspace is smaller than spectral_workspace_cuda says";
  return with_device(launched.device, [&]() -> const char* {
    Params params;
    params.blocks = tiling.blocks;
    params.cluster = tiling.cluster;
    params.scale = p.scale != 0;
    params.iterations = p.iterations;
    params.fresh = static_cast<int>(std::min<int64_t>(p.fresh, K));
    params.flags = static_cast<unsigned*>(launched.workspace);
    params.workspace = static_cast<char*>(launched.workspace) + tiling.flags;
    params.space = tiling.space;
    const bool flags = tiling.blocks > 1 && !tiling.cluster;
    for (int64_t first = 0; first < p.count; first += MOST) {
      params.count = static_cast<int>(std::min<int64_t>(p.count - first, MOST));
      params.seed = p.seed + static_cast<uint64_t>(first);
      params.norms = p.norms + first;
      params.near = p.near + first;
      for (int i = 0; i < params.count; ++i) {
        const SpectralMatrix& a = p.matrices[first + i];
        Matrix& m = params.matrices[i];
        m = {reinterpret_cast<void*>(a.w), reinterpret_cast<float*>(a.block), a.stride,
             p.bounds[first + i],          static_cast<int>(a.rows),          static_cast<int>(a.cols),
             static_cast<int>(a.width),    static_cast<int>(a.dtype),         {}};
        lay_out(a, tiling.blocks, tiling.cluster, limits.shared_bytes, &m.layout);
      }
      const int blocks = params.count * tiling.blocks;
      if (flags)
        if (const char* problem =
                launch(lower, Grid{1, 256, 1, 0, false, launched.stream}, Flags{params.flags, blocks}))
          return problem;
      const Grid grid{blocks, THREADS, tiling.cluster ? tiling.blocks : 1, tiling.shared_bytes, flags, launched.stream};
      if (const char* problem = launch(spectral_step, grid, params)) return problem;
    }
    return nullptr;
  });
}

}   // namespace stable_rnn
