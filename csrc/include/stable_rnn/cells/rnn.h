// h = tanh(z) or max(z, 0), for z = h W_hh^T + xp. What h says of the step is all that its adjoint needs.
#pragma once
#include "stable_rnn/cell.h"

namespace stable_rnn {

struct Rnn {
  static constexpr int tanh_code = 0, relu_code = 1;
  static constexpr bool is(int code) { return code == tanh_code || code == relu_code; }
  static constexpr int gates = 1, saved = 0, forgets = -1, hidden_bias = -1;
  static constexpr bool has_cell = false, projects = false, h_before = false, h_after = true;

  bool relu;

  STABLE_RNN_HD Rnn(int code, float) : relu(code == relu_code) {}

  template <class V>
  struct Step {
    V h;
    STABLE_RNN_HD void save(V*) const {}
  };

  template <class V>
  STABLE_RNN_HD Step<V> step(const V* sums, const V* x, V, State<V>) const {
    const V z = sums[0] + x[0];
    return {relu ? at_least(z, V(0.f)) : hyperbolic_tangent(z).value()};
  }

  template <class V>
  STABLE_RNN_HD Adjoint<V, gates> vjp(State<V> d, const V*, State<V> after, State<V>) const {
    const V h = after.h;
    return {{relu ? select_le(h, V(0.f), V(0.f), d.h) : d.h * fma(V(0.f) - h, h, V(1.f))}, {V(0.f), V(0.f)}};
  }

  template <class V>
  static STABLE_RNN_HD V hidden(int, V dz, const V*) {
    return dz;
  }
};

}   // namespace stable_rnn
