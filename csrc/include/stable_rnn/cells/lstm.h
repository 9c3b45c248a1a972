// Hochreiter & Schmidhuber 1997, with forget gates (Gers et al. 2000). For z = h W_hh^T + xp
//     i, f, o = sigmoid(z_i, z_f, z_o),  g = tanh(z_g),  c = min(f, cap) c_before + i g,  h = o tanh(c), or W_hr of that.
// Gates are in torch's order i, f, g, o; saved are i, min(f, cap), g, o.
#pragma once
#include "stable_rnn/cell.h"

namespace stable_rnn {

struct Lstm {
  static constexpr bool is(int code) { return code == 2; }
  static constexpr int gates = 4, saved = 4, forgets = 1, hidden_bias = -1;
  static constexpr bool has_cell = true, projects = true, h_before = false, h_after = false;

  float cap;   // upper bound of the forget gate; 1: none

  STABLE_RNN_HD Lstm(int, float cap) : cap(cap) {}

  template <class V>
  struct Step {
    Fraction<V> i, g, o;
    V f, c, h;
    STABLE_RNN_HD void save(V* kept) const {
      kept[0] = i.value();
      kept[1] = f;
      kept[2] = g.value();
      kept[3] = o.value();
    }
  };

  template <class V>
  STABLE_RNN_HD Step<V> step(const V* sums, const V* x, V, State<V> before) const {
    Step<V> s;
    s.i = sigmoid(sums[0] + x[0]);
    s.f = at_most(sigmoid(sums[1] + x[1]).value(), V(cap));
    s.g = hyperbolic_tangent(sums[2] + x[2]);
    s.o = sigmoid(sums[3] + x[3]);
    s.c = fma(s.f, before.c, (s.i * s.g).value());
    s.h = (s.o * hyperbolic_tangent(s.c)).value();
    return s;
  }

  // Where the cap holds, f is constant.
  template <class V>
  STABLE_RNN_HD Adjoint<V, gates> vjp(State<V> d, const V* kept, State<V> after, State<V> before) const {
    const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], one(1.f), th = hyperbolic_tangent(after.c).value();
    const V dc = fma(d.h * o, fma(V(0.f) - th, th, one), d.c);
    V df = dc * before.c * (f * (one - f));
    if (cap < 1.f) df = select_le(V(cap), f, V(0.f), df);
    return {{dc * g * (i * (one - i)), df, dc * i * fma(V(0.f) - g, g, one), d.h * th * (o * (one - o))},
            {V(0.f), dc * f}};
  }

  template <class V>
  static STABLE_RNN_HD V hidden(int, V dz, const V*) {
    return dz;
  }
};

}   // namespace stable_rnn
