// Dense algebra on 16 x 16 matrices of doubles, row-major: what is left of the spectral projection inside a block.
#pragma once
#include <cmath>

#include "isa.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

constexpr int K = 16;
using Small = double[K][K];

// In G = Z^T Z; out the upper triangular T with orthonormal Z T. A column that depends on those before it gets a zero column.
inline void orthogonalizer(const Small& G, Small& T) {
  double R[K][K] = {};   // G = R^T R
  bool kept[K];
  for (int c = 0; c < K; ++c) {
    double pivot = G[c][c];
    for (int i = 0; i < c; ++i) pivot -= R[i][c] * R[i][c];
    kept[c] = pivot > 1e-12 * G[c][c] && pivot > 1e-280;   // float data carry no more
    R[c][c] = kept[c] ? std::sqrt(pivot) : 1;
    for (int j = c + 1; j < K; ++j) {
      double sum = G[c][j];
      for (int i = 0; i < c; ++i) sum -= R[i][c] * R[i][j];
      R[c][j] = kept[c] ? sum / R[c][c] : 0;
    }
  }
  for (int c = 0; c < K; ++c)   // T = R^-1, column by column
    for (int i = K - 1; i >= 0; --i) {
      double sum = i == c ? 1 : 0;
      for (int j = i + 1; j <= c; ++j) sum -= R[i][j] * T[j][c];
      T[i][c] = i <= c && kept[c] ? sum / R[i][i] : 0;
    }
}

// Eigenvalues of the symmetric A (destroyed), descending, and eigenvectors in the columns of E. Cyclic Jacobi rotations.
inline void eigen(Small& A, double (&values)[K], Small& E) {
  double rows[K][K] = {};   // E^T
  for (int i = 0; i < K; ++i) rows[i][i] = 1;
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool rotated = false;
    for (int p = 0; p < K - 1; ++p)
      for (int q = p + 1; q < K; ++q) {
        if (std::fabs(A[p][q]) <= 1e-14 * std::sqrt(std::fabs(A[p][p] * A[q][q]))) continue;
        rotated = true;
        const double theta = (A[q][q] - A[p][p]) / (2 * A[p][q]);
        const double t = std::copysign(1 / (std::fabs(theta) + std::sqrt(theta * theta + 1)), theta);
        const double c = 1 / std::sqrt(t * t + 1), s = t * c;
        auto rotate = [c, s](double& x, double& y) {
          const double old = x;
          x = c * old - s * y;
          y = s * old + c * y;
        };
        for (int i = 0; i < K; ++i) rotate(A[p][i], A[q][i]);
        for (int i = 0; i < K; ++i) rotate(A[i][p], A[i][q]);
        for (int i = 0; i < K; ++i) rotate(rows[p][i], rows[q][i]);
      }
    if (!rotated) break;
  }
  bool used[K] = {};
  for (int place = 0; place < K; ++place) {
    int best = -1;
    for (int i = 0; i < K; ++i)
      if (!used[i] && (best < 0 || A[i][i] > A[best][best])) best = i;
    used[best] = true;
    values[place] = A[best][best] > 0 ? A[best][best] : 0;
    for (int i = 0; i < K; ++i) E[i][place] = rows[best][i];
  }
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
