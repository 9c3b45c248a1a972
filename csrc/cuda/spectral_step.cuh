// One matrix, seen by one block of the team that projects it.
//
// The team's blocks own slabs of rows of W, and slabs of rows of X. They exchange sums through the L2 cache and meet at barriers:
//     largest |W|                                    | meet |    unit (1 for ordinary weights), or NaN: nothing is written
//     repeat:  Y = W X,  own summand of W^T Y        | meet |    own rows of Z = sum of the summands, in the order of the blocks
//              own rows of Z, own summand of Z^T Z   | meet |    Z^T Z = R^T R; X = Z R^-1 becomes Y = (W Z) R^-1, so that the factorization
//                                                                runs beside the product
//              the last time, and where the columns of Z are far from orthogonal:
//              own rows of Z <- Z R^-1, and so on    | meet |    the same again: orthonormal to rounding
//     Y = W X,  own summand of Y^T Y                 | meet |    its eigenvectors: Rayleigh-Ritz. Own rows of W and of the block are written
// Every block finds small matrices, and so all decisions, for itself from the same summands.
#pragma once
#include "spectral_product.cuh"
#include "spectral_small.cuh"

namespace stable_rnn {
namespace spectral {

__device__ __forceinline__ uint64_t mixed(uint64_t x) {   // one draw of splitmix64, as csrc/cpu/kernels/spectral.cpp
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

class Team {
 public:
  const int index, rank, blocks;   // index: of the matrix

  __device__ __forceinline__ explicit Team(const Params& p)
      : index(block_index() / p.blocks), rank(block_index() % p.blocks), blocks(p.blocks), cluster_(p.cluster),
        flags_(p.flags + int64_t(index) * p.blocks) {}

  // What any thread of the team wrote before is seen by all afterwards, if they read it from L2.
  __device__ __forceinline__ void meet() {
    if (cluster_) return cluster_sync();
    block_sync();
    if (blocks == 1) return;
    ++round_;
    if (thread_index() == 0) flag_signal(flags_ + rank, round_);
    for (int r = thread_index(); r < blocks; r += THREADS) flag_wait(flags_ + r, round_);
    block_sync();
  }

 private:
  const bool cluster_;
  unsigned* const flags_;
  unsigned round_ = 0;
};

class Step {
 public:
  __device__ __forceinline__ Step(const Params& p, Team& team)
      : p_(p), a_(*in_shared<Matrix>(Shared::matrix)), l_(a_.layout), team_(team) {
    if (thread_index() == 0) *in_shared<Matrix>(Shared::matrix) = p.matrices[team.index];
    block_sync();
    const Shared at(l_);
    y_ = static_cast<int>(at.y);
    w_ = static_cast<int>(at.w);
    x_ = static_cast<int>(at.x);
    z_ = static_cast<int>(at.z);
    space_ = p.workspace + team.index * p.space.bytes;
    first_ = min_of(int64_t(team.rank) * l_.share, a_.rows);
    last_ = min_of(int64_t(first_) + l_.share, a_.rows);
    const int slab = (a_.cols + l_.blocks - 1) / l_.blocks;
    x_first_ = min_of(int64_t(team.rank) * slab, a_.cols);
    x_last_ = min_of(int64_t(x_first_) + slab, a_.cols);
  }

  __device__ __forceinline__ void run() {
    if (a_.rows == 0 || a_.cols == 0) return report(0, 0);
    if (!begin()) return report(NAN, 0);
    for (int i = 0;; ++i) {
      multiply(i > 0, i == p_.iterations);
      if (i == p_.iterations) break;
      combine();
      publish();
      exchange_gram();
      if (i == p_.iterations - 1 || crowded(G())) {
        if (warp() == WARPS - 1) orthogonalizer(G(), T());
        block_sync();
        rotate(X(), x_first_, x_last_, T());
        sum_ = 0;
        add_gram(X(), x_first_, x_last_);
        publish();
        exchange_gram();
      }
      gather();
    }
    exchange_gram();
    decide();
  }

 private:
  const Params& p_;
  const Matrix& a_;
  const Layout& l_;
  Team& team_;
  int y_, w_, x_, z_;                     // where they begin in shared memory
  char* space_;                           // the team's
  int first_, last_, x_first_, x_last_;   // own rows of W and of X
  int exponent_ = 0;                      // of the unit
  int turn_ = 0;                          // which of two places the next Gram matrices take
  double sum_ = 0;                        // of threads below K * K: an entry of the own summand of a Gram matrix

  template <class T>
  static __device__ __forceinline__ T* in_shared(int offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  static __device__ __forceinline__ double* G() { return in_shared<double>(Shared::gram); }
  static __device__ __forceinline__ double* E() { return in_shared<double>(Shared::eigenvectors); }
  static __device__ __forceinline__ double* S() { return in_shared<double>(Shared::singular); }
  static __device__ __forceinline__ float* T() { return in_shared<float>(Shared::orthogonal); }
  static __device__ __forceinline__ float* F() { return in_shared<float>(Shared::turn); }
  static __device__ __forceinline__ float* C() { return in_shared<float>(Shared::excess); }
  static __device__ __forceinline__ float* scratch() { return in_shared<float>(Shared::scratch); }
  __device__ __forceinline__ float* Y() const { return in_shared<float>(y_); }
  __device__ __forceinline__ float* X() const { return l_.shared_x ? in_shared<float>(x_) : published(); }
  __device__ __forceinline__ float* Z() const { return l_.shared_z ? in_shared<float>(z_) : own_partial(); }
  __device__ __forceinline__ float* W() const { return in_shared<float>(w_); }

  template <class T>
  __device__ __forceinline__ T* in_space(int64_t offset) const {
    return reinterpret_cast<T*>(space_ + offset);
  }
  __device__ __forceinline__ float* partials() const { return in_space<float>(p_.space.partials); }
  __device__ __forceinline__ float* own_partial() const { return partials() + int64_t(team_.rank) * l_.pitch * K; }
  __device__ __forceinline__ float* published() const { return in_space<float>(p_.space.x); }
  __device__ __forceinline__ float* all_y() const { return in_space<float>(p_.space.y); }
  __device__ __forceinline__ double* grams() const { return in_space<double>(p_.space.grams); }
  __device__ __forceinline__ float* largest() const { return in_space<float>(p_.space.largest); }

  static __device__ __forceinline__ int min_of(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }
  static __device__ __forceinline__ int warp() { return thread_index() / 32; }

  // ---- W: tiles of the own rows, in units of 2^exponent

  template <class T>
  __device__ __forceinline__ T* row_of(int i) const {
    return static_cast<T*>(a_.w) + i * a_.stride;
  }

  // Starts the way of tile t into a buffer; zeros beyond the last row and column.
  __device__ __forceinline__ void fetch(int t, float* buffer) const {
    if (a_.dtype == BF16) fetch_as<Bf16>(t, buffer);
    else if (a_.dtype == F16) fetch_as<Half>(t, buffer);
    else fetch_as<float>(t, buffer);
    copy_commit();
  }

  template <class T>
  __device__ __forceinline__ void fetch_as(int t, float* buffer) const {
    const bool aligned = reinterpret_cast<uintptr_t>(a_.w) % 16 == 0 && a_.stride % (16 / sizeof(T)) == 0;
    for (int r = warp(); r < l_.tile; r += WARPS) {
      const int i = first_ + t * l_.tile + r;
      const T* row = row_of<T>(i < last_ ? i : 0);
      for (int j = thread_index() % 32 * 4; j < l_.pitch; j += 32 * 4) {
        float* to = buffer + weight_at(r, j, l_.pitch);
        const int count = i < last_ ? a_.cols - j : 0;
        if (sizeof(T) == 4 && aligned && count >= 4) copy_async<16>(to, row + j);
        else
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (k >= count) to[k] = 0;
            else if constexpr (sizeof(T) == 4) copy_async<4>(to + k, row + j + k);
            else to[k] = row[j + k];
      }
    }
  }

  __device__ __forceinline__ void into_units(float* tile) const {
    if (exponent_ == 0) return;
    for (int e = thread_index(); e < l_.tile * l_.pitch; e += THREADS) tile[e] = ldexpf(tile[e], -exponent_);
    block_sync();
  }

  // body(t, tile) for each tile, between barriers. A single one was fetched before.
  template <class Body>
  __device__ __forceinline__ void each_tile(const Body& body) {
    const int64_t size = int64_t(l_.tile) * l_.pitch;
    if (l_.tiles > 1) fetch(0, W());
    for (int t = 0; t < l_.tiles; ++t) {
      float* tile = W() + (l_.buffers == 2 && t % 2 ? size : 0);
      const bool more = t + 1 < l_.tiles;
      if (more && l_.buffers == 2) {
        fetch(t + 1, W() + (t % 2 ? 0 : size));
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      block_sync();
      if (l_.tiles > 1) into_units(tile);
      body(t, tile);
      block_sync();
      if (more && l_.buffers == 1) fetch(t + 1, W());
    }
  }

  __device__ __forceinline__ int rows_of(int t) const {   // of a tile
    const int left = last_ - first_ - t * l_.tile;
    return left < 0 ? 0 : left < l_.tile ? left : l_.tile;
  }

  // ---- the beginning: the unit, the start of X. False if W is not finite.

  __device__ __forceinline__ bool begin() {
    if (l_.tiles == 1) fetch(0, W());
    float most = 0, invalid = 0;
    each_tile([&](int, const float* tile) {
      for (int e = thread_index(); e < l_.tile * l_.pitch; e += THREADS) {
        most = fmaxf(most, fabsf(tile[e]));
        invalid = fma(tile[e], 0.f, invalid);
      }
    });
    if (invalid != 0) most = NAN;
    scratch()[thread_index()] = most;
    block_sync();
    if (warp() == 0) {
      for (int e = thread_index() + 32; e < THREADS; e += 32) most = larger(most, scratch()[e]);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) most = larger(most, shuffle_xor(most, mask));
      if (thread_index() == 0) store_l2(largest() + team_.rank, most);
    }
    start();
    team_.meet();
    most = 0;
    for (int s = 0; s < l_.blocks; ++s) most = larger(most, load_l2(largest() + s));
    if (most != most) return false;
    // Powers of W up to the third must keep in range, for any shape: other weights than these are taken in units of their own.
    if (most > 0 && (most < 0x1p-20f || most > 0x1p20f)) exponent_ = ilogbf(most) + 1;
    if (l_.tiles == 1) into_units(W());
    return true;
  }

  static __device__ __forceinline__ float larger(float a, float b) {
    return a != a || a > b ? a : b;
  }   // NaN if one is

  // X: the kept vectors, then fresh random ones, then zeros.
  __device__ __forceinline__ void start() {
    const int first = l_.shared_x ? 0 : x_first_;
    const int last = l_.shared_x || team_.rank == l_.blocks - 1 ? l_.pitch : x_last_;
    const int kept = a_.width > p_.fresh ? a_.width - p_.fresh : 0;
    const uint64_t seed = mixed(p_.seed + team_.index);
    float* X = this->X();
    for (int e = first * K + thread_index(); e < last * K; e += THREADS) {
      const int j = e / K, c = e % K;
      float x = 0;
      if (j < a_.cols && c < kept) x = a_.block[int64_t(j) * a_.width + c];
      else if (j < a_.cols && c < a_.width)   // uniform in (-1, 1)
        x = static_cast<float>((static_cast<int64_t>(mixed(seed + static_cast<uint64_t>(int64_t(j) * K + c))) >> 11) *
                               0x1p-52);
      X[block_at(j, c)] = x;
    }
  }

  // ---- products

  // Y = W X T (T from G, or none); then the summand of W^T Y, or, at the end, of Y^T Y.
  __device__ __forceinline__ void multiply(bool turned, bool end) {
    sum_ = 0;
    each_tile([&](int t, const float* tile) {
      const int rows = (rows_of(t) + 15) / 16 * 16;   // there are zeros
      int first = 0;
      do forward(tile, first, rows - first < STRIP ? rows - first : STRIP, turned, turned && t == 0 && first == 0);
      while ((first += STRIP) < rows);
      if (!end) {
        for (int j = warp() * 16; j < a_.cols; j += WARPS * 16)
          backward_product(tile, rows, l_.pitch, Y(), j, a_.dtype != F32, t > 0, Z());
        return;
      }
      add_gram(Y(), 0, rows);
      if (l_.tiles > 1)
        for (int e = thread_index(); e < rows_of(t) * K; e += THREADS)
          all_y()[int64_t(first_ + t * l_.tile) * K + e] = Y()[e];
    });
    if (end || !l_.shared_z) return;
    const Quad* from = reinterpret_cast<const Quad*>(Z());
    Quad* to = reinterpret_cast<Quad*>(own_partial());
    const int written = (a_.cols + 15) / 16 * 16 * K / 4;   // rows of Z, not all up to the pitch
    for (int e = thread_index(); e < written; e += THREADS) store_l2(to + e, from[e]);
  }

  // Some rows of Y from a tile. The columns of W are dealt to the warps, and their sums added in order.
  __device__ __forceinline__ void forward(const float* tile, int row, int rows, bool turned, bool factorize) {
    const int warps = factorize ? WARPS - 1 : WARPS;
    const int steps = (a_.cols + 7) / 8, each = (steps + warps - 1) / warps, parts = (steps + each - 1) / each;
    if (factorize && warp() == WARPS - 1) {
      orthogonalizer(G(), T());
    } else if (warp() < parts && rows > 0) {
      const int first = warp() * each * 8, last = min_of(first + each * 8, steps * 8);
      float* part = scratch() + warp() * rows * K;
      if (rows > 16) forward_product<2>(tile, row, l_.pitch, X(), first, last, a_.dtype != F32, part);
      else forward_product<1>(tile, row, l_.pitch, X(), first, last, a_.dtype != F32, part);
    }
    block_sync();
    for (int e = thread_index(); e < rows * K; e += THREADS) {
      float sum = scratch()[e];
      for (int s = 1; s < parts; ++s) sum += scratch()[s * rows * K + e];
      scratch()[e] = sum;
      if (!turned) Y()[block_at(row + e / K, e % K)] = sum;
    }
    block_sync();
    if (!turned) return;
    for (int e = thread_index(); e < rows * K; e += THREADS) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) sum = fma(scratch()[e / K * K + k], T()[k * K + e % K], sum);
      Y()[block_at(row + e / K, e % K)] = sum;
    }
    block_sync();
  }

  // Own rows of Z into X, and their summand of Z^T Z.
  __device__ __forceinline__ void combine() {
    team_.meet();
    float* X = this->X();
    for (int e = x_first_ * K + thread_index(); e < x_last_ * K; e += THREADS) {
      float sum = load_l2(partials() + e);
#pragma unroll 4
      for (int s = 1; s < l_.blocks; ++s) sum += load_l2(partials() + int64_t(s) * l_.pitch * K + e);
      X[e] = sum;
    }
    block_sync();
    sum_ = 0;
    add_gram(X, x_first_, x_last_);
  }

  // sum_ += (B^T B)[r][c] over rows [first, last) of a block. They are widened once, 32 rows at a time.
  __device__ __forceinline__ void add_gram(const float* block, int first, int last) {
    double* wide = reinterpret_cast<double*>(scratch());
    const int r = thread_index() / K, c = thread_index() % K;
    for (; first < last; first += 32) {
      const int count = last - first < 32 ? last - first : 32;
      for (int e = thread_index(); e < count * K; e += THREADS) wide[e] = block[block_at(first + e / K, e % K)];
      block_sync();
      if (r < K)
        for (int i = 0; i < count; ++i) sum_ = fma(wide[i * K + r], wide[i * K + c], sum_);
      block_sync();
    }
  }

  // G = the sum of all blocks' summands.
  __device__ __forceinline__ void exchange_gram() {
    double* place = grams() + turn_ * int64_t(team_.blocks) * K * K;
    turn_ ^= 1;
    if (thread_index() < K * K) store_l2(place + team_.rank * K * K + thread_index(), sum_);
    team_.meet();
    sum_ = 0;
    if (thread_index() < K * K) {
      double sum = 0;
#pragma unroll 4
      for (int s = 0; s < l_.blocks; ++s) sum += load_l2(place + s * K * K + thread_index());
      G()[thread_index()] = sum;
    }
    block_sync();
  }

  // Own rows of X to the others, and theirs back.
  __device__ __forceinline__ void publish() const {
    if (!l_.shared_x) return;
    for (int e = x_first_ * K / 4 + thread_index(); e < x_last_ * K / 4; e += THREADS)
      store_l2(reinterpret_cast<Quad*>(published()) + e, reinterpret_cast<const Quad*>(X())[e]);
  }
  __device__ __forceinline__ void gather() const {
    if (!l_.shared_x) return;
    Quad* X = reinterpret_cast<Quad*>(this->X());
    for (int e = thread_index(); e < a_.cols * K / 4; e += THREADS)
      X[e] = load_l2(reinterpret_cast<const Quad*>(published()) + e);
    block_sync();
  }

  // Rows of a block <- rows T.
  __device__ __forceinline__ void rotate(float* block, int first, int last, const float* T) {
    constexpr int at_once = THREADS / K;
    for (; first < last; first += at_once) {
      const int r = first + thread_index() / K, c = thread_index() % K;
      const float value = r < last ? turned(block, r, c, T) : 0;
      block_sync();
      if (r < last) block[block_at(r, c)] = value;
      block_sync();
    }
  }

  static __device__ __forceinline__ float turned(const float* block, int r, int c, const float* T) {
    const Row row(block, r);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) sum = fma(row[k], T[k * K + c], sum);
    return sum;
  }

  // ---- the end

  __device__ __forceinline__ void decide() {
    if (warp() == WARPS - 1) {
      double* space = reinterpret_cast<double*>(scratch());
      eigen(G(), S(), E(), space, space + K * PITCH);
    }
    block_sync();
    const double bound = scalbn(a_.bound, -exponent_), norm = S()[0];
    const bool outside = norm > bound;
    int near = 0;
    for (int k = 0; k < K; ++k) near += S()[k] > 0.999 * bound;
    report(scalbn(outside ? bound : norm, exponent_), near);

    // X T are the orthonormal vectors: F = T E turns X into the singular vectors, and W loses Y C X^T with C = E (1 - bound / S)_+ F^T.
    double* excess = in_shared<double>(Shared::scratch);
    const int r = thread_index() / K, c = thread_index() % K;
    if (r < K) {
      double sum = 0;
#pragma unroll 4
      for (int k = 0; k < K; ++k) sum = fma(double{T()[r * K + k]}, E()[k * K + c], sum);
      F()[r * K + c] = static_cast<float>(sum);
    }
    if (r == 0) excess[c] = S()[c] > bound ? 1 - bound / S()[c] : 0;
    block_sync();
    if (r < K) {
      double sum = 0;
#pragma unroll 4
      for (int k = 0; k < K; ++k) sum = fma(E()[r * K + k] * excess[k], double{F()[c * K + k]}, sum);
      C()[r * K + c] = static_cast<float>(sum);
    }
    block_sync();
    if (outside)
      each_tile([&](int t, const float* tile) {
        if (p_.scale) scale(t, tile, static_cast<float>(bound / norm));
        else subtract(t, tile);
      });
    const float* X = this->X();
    for (int e = x_first_ * K + thread_index(); e < x_last_ * K; e += THREADS)
      if (e % K < a_.width) a_.block[int64_t(e / K) * a_.width + e % K] = turned(X, e / K, e % K, F());
  }

  __device__ __forceinline__ void scale(int t, const float* tile, float factor) const {
    write(t, tile, [factor](int) { return [factor](int, float w) { return w * factor; }; });
  }

  __device__ __forceinline__ void subtract(int t, const float* tile) {
    if (l_.tiles > 1) {
      for (int e = thread_index(); e < rows_of(t) * K; e += THREADS)
        Y()[e] = all_y()[int64_t(first_ + t * l_.tile) * K + e];
      block_sync();
    }
    rotate(Y(), 0, rows_of(t), C());
    write(t, tile, [this](int j) {
      return [this, x = Row(X(), j)](int r, float w) {
        const Row y(Y(), r);
        float sum = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) sum = fma(y[k], x[k], sum);
        return w - sum;
      };
    });
  }

  // W <- change(column)(row of the tile, W)
  template <class Change>
  __device__ __forceinline__ void write(int t, const float* tile, const Change& change) const {
    if (a_.dtype == BF16) write_as<Bf16>(t, tile, change);
    else if (a_.dtype == F16) write_as<Half>(t, tile, change);
    else write_as<float>(t, tile, change);
  }

  template <class T, class Change>
  __device__ __forceinline__ void write_as(int t, const float* tile, const Change& change) const {
    const int rows = rows_of(t), groups = (rows + 7) / 8;
    for (int e = thread_index(); e < groups * l_.pitch; e += THREADS) {
      const int j = e % l_.pitch, from = e / l_.pitch * 8;
      if (j >= a_.cols) continue;
      const auto changed = change(j);
#pragma unroll
      for (int r = from; r < from + 8; ++r)
        if (r < rows) {
          const float w = changed(r, tile[weight_at(r, j, l_.pitch)]);
          row_of<T>(first_ + t * l_.tile + r)[j] = T(exponent_ == 0 ? w : ldexpf(w, exponent_));
        }
    }
  }

  __device__ __forceinline__ void report(double norm, int near) const {
    if (team_.rank > 0 || thread_index() > 0) return;
    p_.norms[team_.index] = norm;
    p_.near[team_.index] = near;
  }
};

}   // namespace spectral
}   // namespace stable_rnn
