// One step of a plain cell, for streaming. Each weight is used once per row, so panels are packed a slice at a time on the stack and
// nothing is allocated; the sums are those of the recurrence, bit by bit.
#include "approximate.h"
#include "kernels.h"
#include "parallel.h"
#include "stable_rnn/cells.h"
#include "gemm.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

constexpr int64_t slice = 64;               // of k
constexpr int most_rows = 4 * block_rows;   // of the batch at a time

// acc[r][v] = sum over k of a[r][k] * w[v][lane][k], for rows of w that start at w + v * gate.
template <class T, int vectors>
void products(const T* a, int64_t k, int rows, const T* w, int64_t gate, int64_t valid, Vec* acc) {
  using S = StateOf<T>;
  alignas(64) float panel[slice * vectors * width];
  alignas(64) S state[most_rows * slice];
  for (int i = 0; i < rows * vectors; ++i) acc[i] = Vec(0.f);
  for (int64_t from = 0; from < k && a; from += slice) {
    const int64_t part = k - from < slice ? k - from : slice;
    for (int v = 0; v < vectors; ++v)
      pack_transposed<S>(w + v * gate + from, k, valid, part, panel + v * width, vectors * width);
    for (int r = 0; r < rows; ++r)
      for (int64_t j = 0; j < part; j += width) store(state + r * slice + j, load(a + r * k + from + j, part - j));
    constexpr int most = rows_at_once<S, S>;
    for (int r = 0; r < rows; r += most)
      multiply_rows<S, vectors, true>(rows - r < most ? rows - r : most, state + r * slice, slice, panel, part,
                                      acc + r * vectors);
  }
}

// Units [unit, unit + width) of rows [first, first + rows).
template <class T, class Cell>
void units(const CellStepParams& p, Cell cell, int64_t unit, int64_t first, int rows) {
  constexpr int gates = Cell::gates;
  const auto in = [](const void* x) { return static_cast<const T*>(x); };
  const int64_t n = p.hidden - unit, gate = p.hidden;
  using Real = RealOf<T>;
  Vec x[most_rows * gates], z[most_rows * gates];
  products<T, gates>(in(p.x) + first * p.input, p.input, rows, in(p.w_ih) + unit * p.input, gate * p.input, n, x);
  products<T, gates>(p.h ? in(p.h) + first * p.hidden : nullptr, p.hidden, rows, in(p.w_hh) + unit * p.hidden,
                     gate * p.hidden, n, z);
  for (int r = 0; r < rows; ++r) {
    Vec bias(0.f);
    Real sums[gates], xs[gates];
    for (int g = 0; g < gates; ++g) {
      Vec &xp = x[r * gates + g], &second = g == Cell::hidden_bias ? bias : xp;   // where b_hh goes
      if (p.b_ih) xp = xp + load(in(p.b_ih) + g * gate + unit, n);
      if (p.b_hh) second = second + load(in(p.b_hh) + g * gate + unit, n);
      xs[g] = rounded<T>(xp);
      sums[g] = z[r * gates + g];
    }
    const int64_t at = (first + r) * p.hidden + unit;
    const auto state = [&](const void* from) { return from ? load(in(from) + at, n) : Vec(0.f); };
    const State<Real> before{Cell::h_before ? state(p.h) : Vec(0.f), Cell::has_cell ? state(p.c) : Vec(0.f)};
    const auto now = cell.step(sums, xs, Real(bias), before);
    if constexpr (Cell::has_cell) store(static_cast<T*>(p.c_out) + at, now.c, n);
    store(static_cast<T*>(p.h_out) + at, now.h, n);
  }
}

template <class T, class Cell>
const char* run_cell_step(const CellStepParams& p, Cell cell) {
  constexpr int64_t worth_threads = 300000;   // multiply-adds; a core reads their weights more slowly than two
  const int64_t vectors = ceil_div(p.hidden, width), passes = ceil_div(p.batch, most_rows);
  const bool large = p.batch * p.hidden * (p.input + p.hidden) * Cell::gates >= worth_threads;
  parallel(large ? uncrowded(p.threads) : 1, true, [&](Team& team) {
    for (int64_t i = team.begin(vectors * passes); i < team.end(vectors * passes); ++i) {
      const int64_t first = i % passes * most_rows, rest = p.batch - first;
      units<T>(p, cell, i / passes * width, first, int(rest < most_rows ? rest : most_rows));
    }
    team.sync();
  });
  return nullptr;
}

}   // namespace

const char* cell_step(const CellStepParams& p) {
  return dispatch_cell(p.cell, p.cap, [&](auto cell) {
    return p.dtype == BF16 ? run_cell_step<bf16>(p, cell) : run_cell_step<float>(p, cell);
  });
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
