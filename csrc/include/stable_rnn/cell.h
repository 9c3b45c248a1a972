// One step of each cell and its vector-Jacobian product, for any V: float on a GPU thread, a SIMD vector on a CPU.
// Every product-sum is an explicit fma and no library function is called, so a scalar, a vector and a GPU thread round alike
// (on machines with fma). V needs + - * /, V(float) and the five functions that float has here, in its own namespace.
//
// Formulas: h = tanh(z) or max(z, 0);  LSTM (Hochreiter & Schmidhuber 1997, with forget gates: Gers et al. 2000):
//   i, f, o = sigmoid(z_i, z_f, z_o),  g = tanh(z_g),  c = min(f, cap) c_prev + i g,  m = o tanh(c),  h = m or W_hr m.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define STABLE_RNN_HD __host__ __device__ __forceinline__
#else
#define STABLE_RNN_HD inline __attribute__((always_inline))   // never emitted: each instruction set keeps its own copy
#endif

namespace stable_rnn {

STABLE_RNN_HD float fma(float a, float b, float c) { return std::fma(a, b, c); }
STABLE_RNN_HD float at_least(float x, float low) { return x < low ? low : x; }      // a NaN stays
STABLE_RNN_HD float at_most(float x, float high) { return high < x ? high : x; }
STABLE_RNN_HD float select_le(float a, float b, float yes, float no) { return a <= b ? yes : no; }
STABLE_RNN_HD float power_of_two(float t) {   // 2^(m - 127) for the m in the low bits of t, which become the exponent
  uint32_t bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits <<= 23;
  std::memcpy(&t, &bits, sizeof bits);
  return t;
}

// e^(a x) = scale * (1 + p), for a = 1 or 2 and |a x| <= 87: scale = 2^n with n = round(a x / ln 2), and p = e^(a r) - 1 for the rest.
template <class V>
struct Exponential {
  V scale, p;
};

template <int a, class V>
STABLE_RNN_HD Exponential<V> exponential(V x) {
  const V shifter(12582912.f + 127.f);             // adding 1.5 * 2^23 rounds to an integer, held in the low bits; 127 is for the exponent
  const V t = fma(x, V(a * 1.44269504f), shifter);
  const V n = t - shifter;
  V r = fma(n, V(-0.693145751953125f / a), x);     // ln 2 in two parts; the first product is exact
  r = fma(n, V(-1.42860682e-6f / a), r);
  V q(a * a * a * a * a * a * 0.00139510981f);     // (e^s - 1 - s) / s^2 at s = a r, minimax on |s| <= ln 2 / 2: e^s to 5e-9
  q = fma(q, r, V(a * a * a * a * a * 0.00836923905f));
  q = fma(q, r, V(a * a * a * a * 0.0416661985f));
  q = fma(q, r, V(a * a * a * 0.166665152f));
  q = fma(q, r, V(a * a * 0.5f));
  return {power_of_two(t), r * fma(r, q, V(a))};
}

// Non-linearities as fractions: a division costs as much as the rest, and products of two need one division only.
template <class V>
struct Fraction {
  V over, under;
  STABLE_RNN_HD V value() const { return over / under; }
};

template <class V>
STABLE_RNN_HD Fraction<V> operator*(Fraction<V> a, Fraction<V> b) {
  return {a.over * b.over, a.under * b.under};
}

template <class V>
STABLE_RNN_HD Fraction<V> sigmoid(V x) {           // e^x / (1 + e^x); 1 from x = 17 on, so x may end at 40 and products stay finite
  const Exponential<V> e = exponential<1>(at_most(at_least(x, V(-87.f)), V(40.f)));
  const V power = fma(e.scale, e.p, e.scale);
  return {power, power + V(1.f)};
}

template <class V>
STABLE_RNN_HD Fraction<V> hyperbolic_tangent(V x) {   // (e^2x - 1) / (e^2x + 1), with no cancellation near 0; 1 from x = 9.1 on
  const Exponential<V> e = exponential<2>(at_most(at_least(x, V(-10.f)), V(10.f)));
  const V minus_one = fma(e.scale, e.p, e.scale - V(1.f));
  return {minus_one, minus_one + V(2.f)};
}

template <class V>
struct LstmStep {
  Fraction<V> i, g, o;
  V f, c, m;   // f after the cap; m = o tanh(c), which is h where there is no projection
};

template <class V>
STABLE_RNN_HD LstmStep<V> lstm_step(V zi, V zf, V zg, V zo, V c_prev, float cap) {
  LstmStep<V> s;
  s.i = sigmoid(zi);
  s.f = at_most(sigmoid(zf).value(), V(cap));
  s.g = hyperbolic_tangent(zg);
  s.o = sigmoid(zo);
  s.c = fma(s.f, c_prev, (s.i * s.g).value());
  s.m = (s.o * hyperbolic_tangent(s.c)).value();
  return s;
}

template <class V>
struct LstmAdjoint {
  V zi, zf, zg, zo, c_prev;
};

// From the adjoints of m and c to those of the gates' inputs and of c_prev. Where the cap holds, f is constant.
template <class V>
STABLE_RNN_HD LstmAdjoint<V> lstm_vjp(V dm, V dc, V i, V f, V g, V o, V c, V c_prev, float cap) {
  const V one(1.f), th = hyperbolic_tangent(c).value();
  LstmAdjoint<V> d;
  dc = fma(dm * o, fma(V(0.f) - th, th, one), dc);
  d.zi = dc * g * (i * (one - i));
  d.zf = dc * c_prev * (f * (one - f));
  d.zg = dc * i * fma(V(0.f) - g, g, one);
  d.zo = dm * th * (o * (one - o));
  d.c_prev = dc * f;
  if (cap < 1.f) d.zf = select_le(V(cap), f, V(0.f), d.zf);
  return d;
}

template <class V>
STABLE_RNN_HD V rnn_step(V z, bool relu) {
  return relu ? at_least(z, V(0.f)) : hyperbolic_tangent(z).value();
}

template <class V>
STABLE_RNN_HD V rnn_vjp(V dh, V h, bool relu) {
  return relu ? select_le(h, V(0.f), V(0.f), dh) : dh * fma(V(0.f) - h, h, V(1.f));
}

}  // namespace stable_rnn
