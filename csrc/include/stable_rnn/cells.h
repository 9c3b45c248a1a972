// Every cell that kernels are compiled for. A new one joins the list and the message, with a code that no other has: its
// `code` in stable_rnn/cells.
#pragma once
#include "stable_rnn/cells/gru.h"
#include "stable_rnn/cells/lstm.h"
#include "stable_rnn/cells/rnn.h"

namespace stable_rnn {

template <class... Cells>
struct CellList {};
using EveryCell = CellList<Rnn, Lstm, Gru>;
constexpr const char* unknown_cell = "cell must be 0 (rnn_tanh), 1 (rnn_relu), 2 (lstm) or 3 (gru)";

template <class... Cells>
constexpr bool is_one_of(CellList<Cells...>, int code) {
  return (Cells::is(code) || ...);
}
constexpr bool is_cell(int code) { return is_one_of(EveryCell{}, code); }

template <class Body, class First, class... Rest>
static auto dispatch(CellList<First, Rest...>, int code, float cap, const Body& body) {
  if constexpr (sizeof...(Rest) > 0)
    if (!First::is(code)) return dispatch(CellList<Rest...>{}, code, cap, body);
  return body(First(code, cap));
}

// body(cell) with the cell of this code (see is_cell).
template <class Body>
static auto dispatch_cell(int code, float cap, const Body& body) {
  return dispatch(EveryCell{}, code, cap, body);
}

static inline bool has_cell(int code) {
  return dispatch_cell(code, 1.f, [](auto cell) { return decltype(cell)::has_cell; });
}
static inline bool projects(int code) {
  return dispatch_cell(code, 1.f, [](auto cell) { return decltype(cell)::projects; });
}

}   // namespace stable_rnn
