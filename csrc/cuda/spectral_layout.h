// What the kernel of the spectral step is told, and where a block keeps what: device and host agree here.
#pragma once
#include <cmath>

#include "device.cuh"
#include "stable_rnn/cuda.h"
#include "stable_rnn/params.h"

namespace stable_rnn {
namespace spectral {

using std::fma;   // for doubles too: stable_rnn::fma is for floats, and would take them

constexpr int K = SPECTRAL_BLOCK;
constexpr int WARPS = 16;   // of a block. They share a product; the last one does dense algebra beside it
constexpr int THREADS = 32 * WARPS;
constexpr int STRIP = 32;   // most rows of W in one product W X
constexpr int MOST = 48;    // matrices of one launch: kernel parameters are at most 4 KB

struct alignas(16) Quad {
  float v[4];
};

// Of one matrix in a block's shared memory. The first `blocks` of a team own `share` rows of W each, and look at them `tile` at a time; if
// they all fit at once, they stay for the whole step. The team's other blocks only meet: so a small matrix is worked on in the same way,
// to the same bits, beside large ones.
struct Layout {
  int blocks;
  int share, tile, tiles;
  int pitch;     // of W, and rows of a block of vectors: the columns, zeros up to a multiple of 32
  int buffers;   // 2: the next tile is on its way while one is worked on
  bool shared_x,
      shared_z;   // the vectors X, and the sums of W^T Y over the tiles, lie in shared memory, else in the L2 cache
};

struct Matrix {
  void* w;
  float* block;
  int64_t stride;
  double bound;
  int rows, cols, width, dtype;
  Layout layout;
};

// A team's part of the workspace, in bytes from its beginning.
struct Space {
  int64_t partials;   // [blocks][pitch][K] float: summands of W^T Y
  int64_t x;          // [pitch][K] float
  int64_t y;          // [rows][K] float: W X
  int64_t grams;      // [2][blocks][K][K] double, in turn
  int64_t largest;    // [blocks] float
  int64_t bytes;
};

struct Params {
  Matrix matrices[MOST];
  int count, blocks;   // each matrix has a team of so many blocks
  bool cluster;        // a team is a cluster; else, if it has several blocks, it meets through flags
  bool scale;
  int iterations, fresh;
  uint64_t seed;
  double* norms;
  int64_t* near;
  unsigned* flags;   // [count][blocks], zeros at the launch
  char* workspace;   // [count] of Space
  Space space;
};
static_assert(sizeof(Params) <= 4096, "kernel parameters");

// Offsets in shared memory, in bytes: what every matrix needs (its parameters too: registers are scarcer), then scratch, Y, W, and X and Z
// where they are shared.
struct Shared {
  static constexpr int64_t matrix = 0, gram = 128, eigenvectors = gram + 8 * K * K, singular = eigenvectors + 8 * K * K,
                           orthogonal = singular + 8 * K, turn = orthogonal + 4 * K * K, excess = turn + 4 * K * K,
                           scratch = excess + 4 * K * K;
  static_assert(sizeof(Matrix) <= gram - matrix, "room for the parameters");
  int64_t y, w, x, z, bytes;
  STABLE_RNN_HD explicit Shared(const Layout& l) {
    y = scratch + int64_t{4} * WARPS * K * (l.tile < STRIP ? l.tile : STRIP);
    w = y + int64_t{4} * K * l.tile;
    x = w + int64_t{4} * l.buffers * l.tile * l.pitch;
    z = x + (l.shared_x ? int64_t{4} * K * l.pitch : 0);
    bytes = z + (l.shared_z ? int64_t{4} * K * l.pitch : 0);
  }
};

}   // namespace spectral
}   // namespace stable_rnn
