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
STABLE_RNN_HD float power_of_two(float t) {   // 2^n for the n in the low bits of t: those bits go to the exponent, over that of 1
  uint32_t bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  std::memcpy(&t, &bits, sizeof bits);
  return t;
}

// e^x = scale * (1 + p) for |x| <= 88: scale = 2^n, n = round(x / ln 2), p = e^r - 1 with r = x - n ln 2.
template <class V>
struct Exponential {
  V scale, p;
};

template <class V>
STABLE_RNN_HD Exponential<V> exponential(V x) {
  const V shifter(12582912.f);                     // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const V t = fma(x, V(1.44269504f), shifter);
  const V n = t - shifter;
  V r = fma(n, V(-0.693145751953125f), x);         // ln 2 in two parts; the first product is exact
  r = fma(n, V(-1.42860682e-6f), r);
  V q(0.00139510981f);                             // (e^r - 1 - r) / r^2, minimax on |r| <= ln 2 / 2: error of e^r below 5e-9
  q = fma(q, r, V(0.00836923905f));
  q = fma(q, r, V(0.0416661985f));
  q = fma(q, r, V(0.166665152f));
  q = fma(q, r, V(0.5f));
  return {power_of_two(t), fma(r * r, q, r)};
}

template <class V>
STABLE_RNN_HD V sigmoid(V x) {
  const Exponential<V> e = exponential(at_most(at_least(V(0.f) - x, V(-87.f)), V(87.f)));
  return V(1.f) / (V(1.f) + fma(e.scale, e.p, e.scale));
}

template <class V>
STABLE_RNN_HD V hyperbolic_tangent(V x) {
  const Exponential<V> e = exponential(at_most(at_least(x + x, V(-20.f)), V(20.f)));
  const V minus_one = fma(e.scale, e.p, e.scale - V(1.f));   // e^2x - 1, with no cancellation near 0
  return minus_one / (minus_one + V(2.f));
}

template <class V>
struct LstmStep {
  V i, f, g, o, c, m;   // f after the cap; m = o tanh(c), which is h where there is no projection
};

template <class V>
STABLE_RNN_HD LstmStep<V> lstm_step(V zi, V zf, V zg, V zo, V c_prev, float cap) {
  LstmStep<V> s;
  s.i = sigmoid(zi);
  s.f = at_most(sigmoid(zf), V(cap));
  s.g = hyperbolic_tangent(zg);
  s.o = sigmoid(zo);
  s.c = fma(s.f, c_prev, s.i * s.g);
  s.m = s.o * hyperbolic_tangent(s.c);
  return s;
}

template <class V>
struct LstmAdjoint {
  V zi, zf, zg, zo, c_prev;
};

// From the adjoints of m and c to those of the gates' inputs and of c_prev. Where the cap holds, f is constant.
template <class V>
STABLE_RNN_HD LstmAdjoint<V> lstm_vjp(V dm, V dc, V i, V f, V g, V o, V c, V c_prev, float cap) {
  const V one(1.f), th = hyperbolic_tangent(c);
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
  return relu ? at_least(z, V(0.f)) : hyperbolic_tangent(z);
}

template <class V>
STABLE_RNN_HD V rnn_vjp(V dh, V h, bool relu) {
  return relu ? select_le(h, V(0.f), V(0.f), dh) : dh * fma(V(0.f) - h, h, V(1.f));
}

}  // namespace stable_rnn
