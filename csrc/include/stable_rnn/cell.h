// What cells are made of: their arithmetic, for any V: float on a GPU thread, a SIMD vector on a CPU; and what a cell says of itself.
// Every product-sum is an explicit fma and no library function is called, so a scalar, a vector and a GPU thread round alike
// (on machines with fma). V needs + - * /, V(float) and the five functions that float has here, in its own namespace.
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
STABLE_RNN_HD float at_least(float x, float low) { return x < low ? low : x; }   // a NaN stays
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
  const V shifter(12582912.f +
                  127.f);   // adding 1.5 * 2^23 rounds to an integer, held in the low bits; 127 is for the exponent
  const V t = fma(x, V(a * 1.44269504f), shifter);
  const V n = t - shifter;
  V r = fma(n, V(-0.693145751953125f / a), x);   // ln 2 in two parts; the first product is exact
  r = fma(n, V(-1.42860682e-6f / a), r);
  V q(a * a * a * a * a * a *
      0.00139510981f);   // (e^s - 1 - s) / s^2 at s = a r, minimax on |s| <= ln 2 / 2: e^s to 5e-9
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
STABLE_RNN_HD Fraction<V> sigmoid(
    V x) {   // e^x / (1 + e^x); 1 from x = 17 on, so x may end at 40 and products stay finite
  const Exponential<V> e = exponential<1>(at_most(at_least(x, V(-87.f)), V(40.f)));
  const V power = fma(e.scale, e.p, e.scale);
  return {power, power + V(1.f)};
}

template <class V>
STABLE_RNN_HD Fraction<V> hyperbolic_tangent(
    V x) {   // (e^2x - 1) / (e^2x + 1), with no cancellation near 0; 1 from x = 9.1 on
  const Exponential<V> e = exponential<2>(at_most(at_least(x, V(-10.f)), V(10.f)));
  const V minus_one = fma(e.scale, e.p, e.scale - V(1.f));
  return {minus_one, minus_one + V(2.f)};
}

// Of one hidden unit. c is zero, and read by nobody, where the cell has none.
template <class V>
struct State {
  V h, c;
};

// A lane's decay: the product of its forget gates, here with one more of them. What no border can tell from zero becomes zero, before the
// CPU computes with denormal numbers, at a hundredth of its speed.
template <class V>
STABLE_RNN_HD V decayed(V product, V forget) {
  const V next = product * forget;
  return select_le(next, V(1e-30f), V(0.f), next);
}

// What a step leaves to the gates' inputs and to the state before it; h without the part that goes through W_hh.
template <class V, int gates>
struct Adjoint {
  V z[gates];
  State<V> before;
};

// A cell is a struct (cells/*.h; cells.h lists them). Kernels are templates over it and ask it alone:
//     gates          columns of xp and of W_hh's product, in units of H
//     saved          columns of H that the backward pass needs of a step, in the storage type
//     forgets        the gate by which the step's state (c, else h) keeps a part of its own; saved at this place. -1: none forgets
//     hidden_bias    the gate whose hidden product has a bias of its own, [H] (that of every other gate is part of xp); -1: none has
//     has_cell       there is a c beside h
//     projects       h may be W_hr times what step() returns
//     h_before       step() reads the unit's own h of the step before, so that vjp() returns an adjoint of it. Not with `projects`
//     h_after        vjp() reads h after the step
//     is(code)       the codes by which callers name it
//     Cell(code, cap)                     the numbers of a run. Backward, the cap is rounded to the storage type, as what was saved is
//     step(sums, x, bias, before)         sums[gates]: of h W_hh^T, without bias; x[gates]: xp; bias: of `hidden_bias`
//         -> h (W_hr's factor where there is a projection), c, and save(kept), which fills kept[saved]
//     vjp(d, kept, after, before) -> Adjoint     d: adjoints of h and c after the step. Its z[gates] are the adjoints of x
//     hidden(gate, dz, kept)              the adjoint of sums[gate], from that of x[gate]: for W_hh^T's product and W_hh's gradient
// What a cell does not use is passed as zero and compiles to nothing.
template <class Cell, class V>
using Saved = V[Cell::saved ? Cell::saved : 1];

}   // namespace stable_rnn
