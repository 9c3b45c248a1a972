// How warps divide the work of a cell: what the kernels, the packed weights and the tiling have to agree on. It follows from the cell's
// gates, so that a new cell needs nothing here.
//
// Forward, a warp's sums are rows of W_hh, 16 of them to a block: of an even number of gates, two gates of the same 8 units, else one gate
// of 16 units; so a thread ends up with all gates of its units. Backward they are columns of W_hh, 16 units, and run over the rows of all
// gates: four gates, or two, are shared out to as many warps; a single warp sums over any other number, one gate after the other.
#pragma once
#include "stable_rnn/cells.h"

namespace stable_rnn {

struct WarpLayout {
  bool backward;
  int gates;       // of the cell
  int units;       // of a group
  int warps;       // that share a group
  int blocks;      // of 16 rows of weights, of a warp
  int own_gates;   // whose k a warp sums over; forward there is only one k, that of h
  int parts;       // of a lane's state: the k of all gates lie side by side
};

template <class Cell>
constexpr WarpLayout warp_layout(bool backward) {
  constexpr int gates = Cell::gates, units = gates % 2 ? 16 : 8, warps = gates % 4 == 0 ? 4 : gates % 2 ? 1 : 2;
  return backward ? WarpLayout{true, gates, 16, warps, 1, gates / warps, gates}
                  : WarpLayout{false, gates, units, 1, gates * units / 16, 1, 1};
}

inline WarpLayout warp_layout(bool backward, int cell) {
  return dispatch_cell(cell, 1.f, [&](auto of) { return warp_layout<decltype(of)>(backward); });
}

// The variants of a kernel that registers suffice for, 8 * octets lanes of a warp, perhaps W held in registers; and the most warps of a
// block, which is what the variant is compiled for. `element`: bytes, see ProductShape.
constexpr bool crowded(WarpLayout layout) {   // a thread has three gates of 16 units
  return layout.backward ? layout.own_gates > 1 : layout.blocks > 2;
}
constexpr bool is_compiled(WarpLayout layout, int element, int octets, bool held) {
  const bool small = element == 2, many = crowded(layout);
  if (held) return small && !many && octets == 1;
  if (octets == 8) return small && !many && !layout.backward;
  return octets <= 2 || !many || (small && !layout.backward);
}
constexpr bool takes_wgmma(WarpLayout layout, int element, int octets) {
  return !layout.backward && element == 2 && octets >= 4 && is_compiled(layout, element, octets, false);
}
constexpr int most_warps(WarpLayout layout, int octets, bool held) {
  const bool many = crowded(layout);
  if ((held && layout.blocks > 1) || octets >= 4 || (many && octets == 2)) return 8;
  return octets == 2 || (many && !layout.backward) ? 12 : 16;
}

}   // namespace stable_rnn
