// Dense algebra on 16 x 16 matrices of doubles in shared memory, each by one warp: the Cholesky factor and the eigenvectors of a Gram
// matrix. What csrc/cpu/kernels/small.h does on one core; here every step is a wait, so both are arranged for few steps in a row.
#pragma once
#include "spectral_layout.h"

namespace stable_rnn {
namespace spectral {

constexpr int PITCH = K + 1;   // of the matrices that eigen() works on: rows and columns spread over the banks

// To about 1e-14 of 1 / x and 1 / sqrt(x) for 1e-13 < x < 10: from float, in much less time than exactly.
__device__ __forceinline__ double reciprocal(double x) {
  const double start = 1 / static_cast<float>(x);
  return fma(start, fma(-x, start, 1.0), start);
}
__device__ __forceinline__ double reciprocal_root(double x) {
  const double start = 1 / sqrtf(static_cast<float>(x));
  return start * fma(-0.5 * x * start, start, 1.5);
}

// One warp. Whether the columns of Z, G = Z^T Z, are far from orthogonal: else, at unit length, their singular values are within a factor 5
// of each other, and Z T loses no digit to speak of.
__device__ __forceinline__ bool crowded(const double* G) {
  const int lane = thread_index() % 32, j = lane % K;
  const double diagonal = G[j * K + j], inverse = diagonal > 0 ? 1 / diagonal : 0;
  double cosines = 0;   // squares of them
#pragma unroll
  for (int m = 0; m < K / 2; ++m) {
    const int i = 2 * m + lane / K;
    const double g = G[i * K + j], other = shuffle(inverse, i);
    if (i != j) cosines = fma(g * inverse, g * other, cosines);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) cosines += shuffle_xor(cosines, mask);
  return cosines > 0.8;   // the Frobenius norm is then 0.9, and the eigenvalues of the scaled G are 0.1 to 1.9
}

// One warp. G = Z^T Z (K, K) -> the upper triangular T (K, K) with orthonormal Z T. A column that depends on those before it gets a zero
// column. With G = L D L^T: T = L^-T D^-1/2. Elimination in place: column c of L^-1 takes the place of column c of G once that is done
// with. A lane holds every other row of a column. Rows and columns are first scaled by powers of two, to a diagonal in [1, 4).
__device__ __forceinline__ void orthogonalizer(const double* G, float* T) {
  const int lane = thread_index() % 32, j = lane % K, half = lane / K;
  const double diagonal = G[j * K + j], scale = diagonal > 1e-60 ? scalbn(1.0, -(ilogb(diagonal) >> 1)) : 0;
  const double least = 1e-12 * diagonal * scale * scale;   // float data carry no more
  double column[K / 2], root = 0;                          // root: of lane c, D[c]
#pragma unroll
  for (int m = 0; m < K / 2; ++m) column[m] = G[(2 * m + half) * K + j] * scale * shuffle(scale, 2 * m + half);
#pragma unroll
  for (int c = 0; c < K; ++c) {
    const double value = shuffle(column[c / 2], j + c % 2 * K), pivot = shuffle(value, c);
    const bool kept = pivot > shuffle(least, c), own = j == c;
    if (own) root = kept ? pivot : 0;
    const double factor = kept ? (own ? 1 : value) * reciprocal(pivot) : 0;
#pragma unroll
    for (int m = 0; m < K / 2; ++m) {
      const int i = 2 * m + half;
      const double below = 2 * m + 1 > c ? shuffle(column[m], c + half * K) : 0;
      if (own) column[m] = 0;
      if (i > c) column[m] = fma(-factor, below, column[m]);
    }
    if (lane == c + c % 2 * K) column[c / 2] = 1;
  }
  root = root > 0 ? reciprocal_root(root) : 0;
#pragma unroll
  for (int m = 0; m < K / 2; ++m)
    T[j * K + 2 * m + half] = static_cast<float>(scale * column[m] * shuffle(root, 2 * m + half));
}

struct Rotation {
  double c, s;
  __device__ __forceinline__ void operator()(double& x, double& y) const {
    const double old = x;
    x = fma(c, old, -s * y);
    y = fma(s, old, c * y);
  }
};

// Takes A[p][q] to about 1e-7 of what it was. The angle is found in float, which is much faster; that it is a rotation holds to 1e-13.
__device__ __forceinline__ Rotation rotation(double pp, double qq, double pq) {
  const float gap = static_cast<float>(qq - pp), twice = static_cast<float>(2 * pq);
  const float tangent = twice / (gap + copysignf(sqrtf(fma(gap, gap, twice * twice)), gap));
  const double t = tangent, c = reciprocal_root(fma(t, t, 1.0));
  return {c, t * c};
}

// Worth a rotation: relatively 1e-9 of what float data carry, unless both singular values are lost in the rounding of the largest, 1.
__device__ __forceinline__ bool matters(double pp, double qq, double pq) {
  return pq * pq > 1e-18 * (pp * qq) && fabs(pq) > 1e-15;
}

// Round r of 15 pairs all 16 indices: pair k of 8. Every two meet once in a sweep.
__device__ __forceinline__ void pair(int round, int k, int& p, int& q) {
  p = k == 0 ? K - 1 : (round + k) % (K - 1);
  q = k == 0 ? round : (round + K - 1 - k) % (K - 1);
}

__device__ __forceinline__ bool any(bool mine) {
  int found = mine;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) found |= shuffle_xor(found, mask);
  return found;
}

// One warp. G symmetric, positive semidefinite -> the roots of its eigenvalues, descending, and eigenvectors in the columns of E (K, K).
// Parallel Jacobi: 8 rotations at a time. A, R: (K, PITCH) to work in.
__device__ __forceinline__ void eigen(const double* G, double* roots, double* E, double* A, double* R) {
  const int lane = thread_index() % 32;
  double most = G[lane % K * (K + 1)];
#pragma unroll
  for (int mask = 8; mask > 0; mask /= 2) most = fmax(most, shuffle_xor(most, mask));
  const int exponent = most > 0 ? ilogb(most) : 0;
#pragma unroll 1
  for (int e = lane; e < K * K; e += 32) {
    A[e / K * PITCH + e % K] = scalbn(G[e], -exponent);
    R[e / K * PITCH + e % K] = e / K == e % K;
  }
  warp_sync();
  auto at = [A](int r, int c) -> double& { return A[r * PITCH + c]; };
  for (int sweep = 0; sweep < 20; ++sweep) {
    bool mine = false;
#pragma unroll 2
    for (int e = lane; e < K * K; e += 32)
      mine |= e / K < e % K && matters(at(e / K, e / K), at(e % K, e % K), at(e / K, e % K));
    if (!any(mine)) break;
    for (int round = 0; round < K - 1; ++round) {
      int p, q;
      pair(round, lane % 8, p, q);
      const double pp = at(p, p), qq = at(q, q), pq = at(p, q);
      const Rotation own = matters(pp, qq, pq) ? rotation(pp, qq, pq) : Rotation{1, 0};
      const int i =
          lane / 4;   // the lane's rows are those of pair i, its columns those of pairs lane % 4 and lane % 4 + 4
      const Rotation rows = {shuffle(own.c, i), shuffle(own.s, i)};
      pair(round, i, p, q);
      warp_sync();
#pragma unroll
      for (int j = lane % 4; j < 8; j += 4) {
        const Rotation columns = {shuffle(own.c, j), shuffle(own.s, j)};
        int u, v;
        pair(round, j, u, v);
        double a = at(p, u), b = at(p, v), c = at(q, u), d = at(q, v);
        rows(a, c);
        rows(b, d);
        columns(a, b);
        columns(c, d);
        at(p, u) = a, at(p, v) = b, at(q, u) = c, at(q, v) = d;
      }
#pragma unroll
      for (int j = lane % 4; j < K; j += 4) rows(R[p * PITCH + j], R[q * PITCH + j]);
      warp_sync();
    }
  }
  if (lane >= K) return;
  const double own = at(lane, lane);
  int place = 0;
#pragma unroll 4
  for (int i = 0; i < K; ++i) place += at(i, i) > own || (at(i, i) == own && i < lane);
  roots[place] = own > 0 ? sqrt(scalbn(own, exponent)) : 0;
#pragma unroll 4
  for (int i = 0; i < K; ++i) E[i * K + place] = R[lane * PITCH + i];
}

}   // namespace spectral
}   // namespace stable_rnn
