// Cho et al. 2014, in torch's form, whose reset gate comes after the product. For q = h W_hh^T
//     r = sigmoid(q_r + xp_r),  z = min(sigmoid(q_z + xp_z), cap),  n = tanh(xp_n + r (q_n + b)),  h = (1 - z) n + z h_before.
// Gates are in torch's order r, z, n; saved are r, z, n, q_n + b. b is the part of torch's bias_hh that n multiplies with r.
#pragma once
#include "stable_rnn/cell.h"

namespace stable_rnn {

struct Gru {
  static constexpr bool is(int code) { return code == 3; }
  static constexpr int gates = 3, saved = 4, forgets = 1, hidden_bias = 2;
  static constexpr bool has_cell = false, projects = false, h_before = true, h_after = false;

  float cap;   // upper bound of z, which keeps what h was; 1: none

  STABLE_RNN_HD Gru(int, float cap) : cap(cap) {}

  template <class V>
  struct Step {
    V r, z, n, q, h;
    STABLE_RNN_HD void save(V* kept) const {
      kept[0] = r;
      kept[1] = z;
      kept[2] = n;
      kept[3] = q;
    }
  };

  template <class V>
  STABLE_RNN_HD Step<V> step(const V* sums, const V* x, V bias, State<V> before) const {
    Step<V> s;
    s.r = sigmoid(sums[0] + x[0]).value();
    s.z = at_most(sigmoid(sums[1] + x[1]).value(), V(cap));
    s.q = sums[2] + bias;
    s.n = hyperbolic_tangent(fma(s.r, s.q, x[2])).value();
    s.h = fma(s.z, before.h - s.n, s.n);
    return s;
  }

  // Where the cap holds, z is constant.
  template <class V>
  STABLE_RNN_HD Adjoint<V, gates> vjp(State<V> d, const V* kept, State<V>, State<V> before) const {
    const V r = kept[0], z = kept[1], n = kept[2], q = kept[3], one(1.f);
    const V dn = d.h * (one - z) * fma(V(0.f) - n, n, one);
    V dz = d.h * (before.h - n) * (z * (one - z));
    if (cap < 1.f) dz = select_le(V(cap), z, V(0.f), dz);
    return {{dn * q * (r * (one - r)), dz, dn}, {d.h * z, V(0.f)}};
  }

  template <class V>
  static STABLE_RNN_HD V hidden(int gate, V dz, const V* kept) {
    return gate == 2 ? dz * kept[0] : dz;
  }
};

}   // namespace stable_rnn
