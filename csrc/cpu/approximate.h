// A Vec with short exponentials, for states stored in bfloat16 where their products are too. Relative errors: of the sigmoid s and of 1 - s
// below 5e-6 for |x| <= 40, of tanh below 2e-5; a unit of bfloat16 is 4e-3. cell.h does the rest of a step with it. Minimax polynomials.
#pragma once
#include "gemm.h"
#include "stable_rnn/cell.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

template <bool approximate>
struct Arithmetic {
  using Type = Vec;
};
// What the gates of a step are computed with, for states in storage T.
template <class T>
using RealOf = typename Arithmetic<sizeof(StateOf<T>) == 2>::Type;

#if defined(__AVX512BF16__)
struct Approximate {
  Vec x;
  Approximate() = default;
  STABLE_RNN_INLINE Approximate(Vec x) : x(x) {}
  STABLE_RNN_INLINE explicit Approximate(float x) : x(x) {}
  STABLE_RNN_INLINE operator Vec() const { return x; }
};

template <>
struct Arithmetic<true> {
  using Type = Approximate;
};

STABLE_RNN_INLINE Approximate operator+(Approximate a, Approximate b) { return a.x + b.x; }
STABLE_RNN_INLINE Approximate operator-(Approximate a, Approximate b) { return a.x - b.x; }
STABLE_RNN_INLINE Approximate operator*(Approximate a, Approximate b) { return a.x * b.x; }
STABLE_RNN_INLINE Approximate operator/(Approximate a, Approximate b) { return a.x / b.x; }
STABLE_RNN_INLINE Approximate fma(Approximate a, Approximate b, Approximate c) { return fma(a.x, b.x, c.x); }
STABLE_RNN_INLINE Approximate at_least(Approximate x, Approximate low) { return at_least(x.x, low.x); }
STABLE_RNN_INLINE Approximate at_most(Approximate x, Approximate high) { return at_most(x.x, high.x); }

constexpr float log2_e = 1.44269504f;

// 1 / (1 + 2^y), y = -x / ln 2. The power is 2^floor(y) times that of the rest; 1 / infinity is 0.
STABLE_RNN_INLINE Fraction<Approximate> sigmoid(Approximate x) {
  const Vec y = x.x * Vec(-log2_e), r = Vec(_mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF));
  Vec p(0.0135341678f);
  p = fma(p, r, Vec(0.0520114601f));
  p = fma(p, r, Vec(0.241442755f));
  p = fma(p, r, Vec(0.693003833f));
  p = fma(p, r, Vec(1.00000262f));
  return {Approximate(1.f), Vec(1.f) + Vec(_mm512_mask_scalef_ps(p.v, -1, p.v, y.v))};
}

// (1 - 2^y) / (1 + 2^y) with the sign of x, y = -2 |x| / ln 2, which does not overflow. 2^y = scale (1 + p), with no cancellation near 0.
STABLE_RNN_INLINE Fraction<Approximate> hyperbolic_tangent(Approximate x) {
  const Vec y = Vec(_mm512_abs_ps(x.x.v)) * Vec(-2 * log2_e);
  const Vec r = Vec(_mm512_reduce_ps(y.v, _MM_FROUND_TO_NEAREST_INT));
  const Vec scale = Vec(_mm512_mask_scalef_ps(y.v, -1, Vec(1.f).v, (y - r).v));
  Vec q(0.00961811095f);
  q = fma(q, r, Vec(0.0558372885f));
  q = fma(q, r, Vec(0.240232527f));
  q = fma(q, r, Vec(0.693136871f));
  const Vec size = fma(Vec(0.f) - scale, r * q, Vec(1.f) - scale);
  const Vec sign = Vec(_mm512_and_ps(x.x.v, Vec(-0.f).v));
  return {Vec(_mm512_or_ps(size.v, sign.v)), Vec(2.f) - size};
}
#endif

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
