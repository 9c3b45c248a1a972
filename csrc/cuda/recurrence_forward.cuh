// The forward recurrence on lanes: z = h W_hh^T + xp, then the gates, for all steps of all lanes in one launch.
//
// A warp has a group of 8 or 16 units (see WarpLayout) times 8 * octets lanes. Thread (g, t) = (lane / 4, lane % 4) holds, of each 8 lanes,
//     all gates of unit g x lanes 2t, 2t + 1, and of unit g + 8 where there are 16
// The cell state stays in registers from step to step; xp of the next step is loaded while the team meets.
//
// A step of M lanes: 2 M G H^2 operations; M G H values of xp, M H of y (training: M S H of what is saved, 4 M H bytes of cells), and the
// weights from where they stay. README.md has the floors.
#pragma once
#include <type_traits>

#include "recurrence_launch.h"
#include "recurrence_weights.cuh"
#include "team.cuh"

namespace stable_rnn {

// Two values on their way from memory. Packed, 16-bit ones take one register, but have to have arrived before the next product.
template <class Storage, bool packed>
struct Kept {
  Storage values[2];
  __device__ __forceinline__ void set(int e, Storage x) { values[e] = x; }
  __device__ __forceinline__ float get(int e) const { return values[e]; }
};
template <class Storage>
struct PackedPair {
  uint32_t word;
  __device__ __forceinline__ void set(int e, Storage x) { word = e == 0 ? x.bits : word | uint32_t(x.bits) << 16; }
  __device__ __forceinline__ float get(int e) const {
    Storage x;
    x.bits = static_cast<uint16_t>(word >> 16 * e);
    return x;
  }
};
template <> struct Kept<Bf16, true> : PackedPair<Bf16> {};
template <> struct Kept<Half, true> : PackedPair<Half> {};

template <int dtype, class Cell, int octets, bool grouped>
struct ForwardWarp {
  using A = std::conditional_t<grouped, GroupProduct<Arithmetic<dtype>>, Arithmetic<dtype>>;
  using Storage = typename A::Storage;
  using Real = typename A::Real;
  static constexpr WarpLayout layout = warp_layout<Cell>(false);
  static constexpr int gates = Cell::gates, rows = layout.blocks, group_units = layout.units, cells = group_units / 4;
  static constexpr int sums_of_gate = 4 * rows / gates;              // of a thread, for each 8 lanes
  static constexpr int row_bytes = group_units * A::shape.element;   // of a lane in the outbox

  const ForwardParams& p;
  const Geometry& geometry;
  const TileLanes& tile;
  const int H, lane, unit;   // lane, unit: the thread's first cell
  float sums[rows][octets][4];
  float c[octets][cells];
  Kept<Storage, (octets >= 4)> x[octets][cells / 2][gates];   // xp of the next step
  Storage h[octets][cells];
  float more[octets][cells][Cell::saved > gates ? Cell::saved - gates : 1];   // of what is saved, see saved()

  __device__ __forceinline__ ForwardWarp(const ForwardParams& p, const Geometry& geometry, const TileLanes& tile,
                                         int rank)
      : p(p), geometry(geometry), tile(tile), H(static_cast<int>(p.hidden)),
        lane(thread_index() / 32 / geometry.groups * (8 * octets) + 2 * t()),
        unit(rank * geometry.units + thread_index() / 32 % geometry.groups * group_units + g()) {}

  __device__ __forceinline__ static int g() { return thread_index() % 32 / 4; }
  __device__ __forceinline__ static int t() { return thread_index() % 4; }
  __device__ __forceinline__ int first_lane() const { return lane - 2 * t(); }   // of the warp
  __device__ __forceinline__ char* outbox() const {
    return shared_memory() + geometry.outbox + thread_index() / 32 * geometry.outbox_of_warp;
  }

  // body(n, e, lane, unit) for this thread's cells
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    const int first = octets == 8 ? not_kept(lane) : lane;
#pragma unroll
    for (int n = 0; n < octets; ++n)
#pragma unroll
      for (int e = 0; e < cells; ++e) body(n, e, first + 8 * n + e % 2, unit + e / 2 * 8);
  }

  // The sum of a gate; and what is saved of a step, in place of the sums as far as these go.
  __device__ __forceinline__ float& sum(int gate, int n, int e) {
    const int at = gate * sums_of_gate;
    return sums[at / 4][n][at % 4 + e];
  }
  __device__ __forceinline__ float& saved(int i, int n, int e) {
    return i < gates ? sum(i, n, e) : more[n][e][i - gates];
  }

  __device__ __forceinline__ void start() {
    each([&](int n, int e, int lane, int unit) {
      const Run& run = tile.runs[lane];
      const bool there = run.steps && unit < H;
      if constexpr (Cell::h_before) h[n][e] = Storage(there ? start_value<Storage>(run, p.h0, p.h_init, H, unit) : 0.f);
      if constexpr (Cell::has_cell) {
        c[n][e] = there ? start_value<Storage>(run, p.c0, p.c_init, H, unit) : 0.f;
        if (there && run.warm == 0 && p.c_start) p.c_start[run.id * H + unit] = c[n][e];
      }
    });
  }

  // Many lanes of 16 bits: a thread loads 8 units of a gate at once, where rows of xp allow that, and the threads that have a lane's cells
  // get them in advance(). `x` has the Quads of lane `thread_index() % 32` of each 32 until then.
  static constexpr bool in_quads = octets >= 4 && sizeof(Storage) == 2;
  __device__ __forceinline__ bool loads_quads() const {
    return in_quads && H % 8 == 0 && reinterpret_cast<uintptr_t>(p.xp) % 16 == 0;
  }
  __device__ __forceinline__ void load_quads(int s) {
    const int first = unit - g();
#pragma unroll
    for (int n = 0; n < octets; n += 4) {
      const Span span = tile.spans[first_lane() + 8 * n + thread_index() % 32];
      const auto* at = static_cast<const Storage*>(p.xp) + row_at(span, s, p.lanes.step) * (gates * H) + first;
#pragma unroll
      for (int half = 0; half < cells / 2; ++half)
#pragma unroll
        for (int gate = 0; gate < gates; ++gate) {
          Quad quad{};
          if (s < span.steps && first + 8 * half < H) quad = *reinterpret_cast<const Quad*>(at + gate * H + 8 * half);
#pragma unroll
          for (int i = 0; i < 4; ++i) x[n + i][half][gate].word = quad.word[i];
        }
    }
  }
  // By way of the outbox, which is free until advance() fills it.
  __device__ __forceinline__ void share_quads() {
    char* own = outbox() + thread_index() % 32 * 16;
#pragma unroll
    for (int gate = 0; gate < gates; ++gate) {
#pragma unroll
      for (int half = 0; half < cells / 2; ++half)
#pragma unroll
        for (int n = 0; n < octets; n += 4) {
          Quad quad;
#pragma unroll
          for (int i = 0; i < 4; ++i) quad.word[i] = x[n + i][half][gate].word;
          *reinterpret_cast<Quad*>(own + (half * octets + n) * 128) = quad;
        }
      warp_sync();
#pragma unroll
      for (int half = 0; half < cells / 2; ++half)
#pragma unroll
        for (int n = 0; n < octets; n += 4) {
          uint32_t words[4];
          load_transposed(words, own + (half * octets + n) * 128);
#pragma unroll
          for (int i = 0; i < 4; ++i) x[n + i][half][gate].word = words[i];
        }
      warp_sync();
    }
  }

  __device__ __forceinline__ void load(int s) {
    if constexpr (in_quads)
      if (loads_quads()) return load_quads(s);
    const auto* xp = static_cast<const Storage*>(p.xp);
    each([&](int n, int e, int lane, int unit) {
      const Span span = tile.spans[lane];
      const bool there = s < span.steps && unit < H;
      const Storage* at = xp + row_at(span, s, p.lanes.step) * (gates * H) + unit;
#pragma unroll
      for (int gate = 0; gate < gates; ++gate) x[n][e / 2][gate].set(e % 2, there ? at[gate * H] : Storage(0.f));
    });
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < rows; ++m)
#pragma unroll
      for (int n = 0; n < octets; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.f;
  }

  // Lanes that begin anew with the step at hand: from zeros, whatever was before.
  __device__ __forceinline__ void begin_anew(int s) {
    if (!p.lanes.resets) return;
    each([&](int n, int e, int lane, int) {
      if (!tile.begins_anew(p.lanes, lane, s)) return;
#pragma unroll
      for (int gate = 0; gate < gates; ++gate) sum(gate, n, e) = 0.f;
      if constexpr (Cell::h_before) h[n][e] = Storage(0.f);
      if constexpr (Cell::has_cell) c[n][e] = 0.f;
    });
  }

  // From the sums of step s to the new states. What others need goes to the outbox; h, c and what is saved stay here.
  __device__ __forceinline__ void advance(int s) {
    if constexpr (in_quads)
      if (loads_quads()) share_quads();
    each([&](int n, int e, int lane, int unit) {
      Real z[gates], xp[gates], bias(0.f);
#pragma unroll
      for (int gate = 0; gate < gates; ++gate) {
        z[gate] = sum(gate, n, e);
        xp[gate] = x[n][e / 2][gate].get(e % 2);
      }
      if constexpr (Cell::hidden_bias >= 0)
        if (p.hidden_bias && unit < H) bias = float(static_cast<const Storage*>(p.hidden_bias)[unit]);
      State<Real> before{0.f, 0.f};
      if constexpr (Cell::h_before) before.h = float(h[n][e]);
      if constexpr (Cell::has_cell) before.c = c[n][e];
      const auto step = Cell(p.cell, p.cap).step(z, xp, bias, before);
      if (Cell::saved && (p.saved || p.decay)) {
        Saved<Cell, Real> kept;
        step.save(kept);
#pragma unroll
        for (int i = 0; i < Cell::saved; ++i) saved(i, n, e) = number(kept[i]);
      }
      if constexpr (Cell::has_cell) c[n][e] = number(step.c);
      const float value = number(step.h);
      h[n][e] = Storage(value);
      const int at =
          Team<grouped>::template in_outbox<8 * octets>(2 * t() + 8 * n + e % 2, (g() + e / 2 * 8) * A::shape.element);
      put_element<A>(outbox() + at, unit < H ? value : 0.f);   // zero, never NaN
    });
  }

  __device__ __forceinline__ void send(Team<grouped>& team) const {
    warp_sync();
    team.template send<8 * octets, row_bytes / 16>(outbox(), [&](int row, int quad) {
      const int column = (unit - g()) * A::shape.element + 16 * quad;
      return column < geometry.segment ? first_lane() * geometry.pitch + A::place(row, column, geometry.pitch) : -1;
    });
  }

  __device__ __forceinline__ void write(int s) {
    each([&](int n, int e, int lane, int unit) {
      const Span span = tile.spans[lane];
      if (s < span.warm || s >= span.steps || unit >= H) return;
      const int64_t row = row_at(span, s, p.lanes.step);
      if (p.y) static_cast<Storage*>(p.y)[row * H + unit] = h[n][e];
      if constexpr (Cell::has_cell)
        if (p.cells) p.cells[row * H + unit] = c[n][e];
      if (Cell::saved && p.saved) {
        Storage* to = static_cast<Storage*>(p.saved) + row * (Cell::saved * H) + unit;
#pragma unroll
        for (int i = 0; i < Cell::saved; ++i) to[i * H] = Storage(saved(i, n, e));
      }
      if constexpr (Cell::forgets >= 0)
        if (p.decay)
          multiply_decay(p.decay + tile.runs[lane].id * H + unit, s == span.warm, tile.begins_anew(p.lanes, lane, s),
                         saved(Cell::forgets, n, e));
    });
  }

  // The states from which lanes begin to write at step s (a lane that writes from step 0 on: see fill_state and start).
  __device__ __forceinline__ void write_starts(int s) const {
    each([&](int n, int e, int lane, int unit) {
      const Run& run = tile.runs[lane];
      if (run.steps == 0 || run.warm != s || unit >= H) return;
      if (p.h_start) p.h_start[run.id * H + unit] = h[n][e];
      if constexpr (Cell::has_cell)
        if (p.c_start) p.c_start[run.id * H + unit] = c[n][e];
    });
  }

  // The last states of lanes that end with step s.
  __device__ __forceinline__ void write_ends(int s) const {
    each([&](int n, int e, int lane, int unit) {
      const Run& run = tile.runs[lane];
      if (run.steps != s + 1 || unit >= H) return;
      if (p.h_end) p.h_end[run.id * H + unit] = h[n][e];
      if (p.h_n && run.last) static_cast<Storage*>(p.h_n)[run.b * H + unit] = h[n][e];
      if constexpr (Cell::has_cell) {
        if (p.c_end) p.c_end[run.id * H + unit] = c[n][e];
        if (p.c_n && run.last) static_cast<Storage*>(p.c_n)[run.b * H + unit] = Storage(c[n][e]);
      }
    });
  }
};

// Every block fills its own copy of the tile's first state, [N][pitch].
template <class A>
__device__ __forceinline__ void fill_state(const ForwardParams& p, const TileLanes& tile, char* state, int pitch,
                                           int first_unit, int units) {
  const int H = static_cast<int>(p.hidden);
  for (int n = thread_index() / 32; n < tile.n; n += thread_count() / 32) {
    const Run& run = tile.runs[n];
    for (int k = thread_index() % 32; k < H; k += 32) {
      const float h = run.steps ? start_value<typename A::Storage>(run, p.h0, p.h_init, H, k) : 0.f;
      put_element<A>(state + A::place(n, k * A::shape.element, pitch), h);
      if (p.h_start && run.steps && run.warm == 0 && k >= first_unit && k < first_unit + units)
        p.h_start[run.id * H + k] = h;
    }
  }
}

template <int dtype, class Cell, int octets, bool held, bool grouped>
__device__ __forceinline__ void run_forward(const ForwardLaunch& q) {
  using Warp = ForwardWarp<dtype, Cell, octets, grouped>;
  using A = typename Warp::A;
  const Geometry& g = q.geometry;
  Team<grouped> team(g, q.meeting);
  const TileLanes tile(g);
  Warp warp(q.p, g, tile, team.rank);
  const BlockWeights<A, Warp::rows> weights(g, q.weights, team.rank, thread_index() / 32 % g.groups);
  HeldWeights<A, held ? Warp::rows : 1> registers;
  if constexpr (held) registers.load(weights.global(), g.chunks);
  const int first_state = warp.first_lane() * g.pitch + A::first_state(thread_index() % 32, g.pitch);
  team.begin();

  for (int64_t first = int64_t(team.index) * g.lanes; first < q.entries; first += int64_t(g.teams) * g.lanes) {
    const Extent extent = tile.load<false>(q.p.lanes, first, q.entries, q.p.h_init != nullptr);
    fill_state<A>(q.p, tile, team.state(), g.pitch, team.rank * g.units, g.units);
    warp.start();
    warp.load(0);
    team.publish();   // also what begin() wrote
    block_sync();
    for (int s = 0; s < extent.most; ++s) {
      warp.clear();
      const char* state = team.state() + first_state;
      if constexpr (grouped)
        group_product<A>(warp.sums, g.place == in_shared ? weights.shared() : weights.global(), g.chunks, state,
                         g.pitch);
      else if constexpr (held) product<A>(warp.sums, registers, g.chunks, state, g.pitch);
      else if (g.place == in_shared) product<A>(warp.sums, weights.shared(), g.chunks, state, g.pitch);
      else product<A>(warp.sums, weights.global(), g.chunks, state, g.pitch);
      warp.begin_anew(s);
      warp.advance(s);
      warp.send(team);
      team.arrive();
      warp.write(s);
      if (q.p.h_start || q.p.c_start) warp.write_starts(s + 1);
      if (s + 1 >= extent.least) warp.write_ends(s);
      warp.load(s + 1);
      tile.template load_resets<false>(q.p.lanes, s + 2);
      team.wait();
    }
  }
}

template <int dtype, class Cell, int octets, bool held>
__global__ void __launch_bounds__(32 * most_warps(warp_layout<Cell>(false), octets, held), 1)
    recurrence_forward(const ForwardLaunch q) {
  run_forward<dtype, Cell, octets, held, false>(q);
}

// Where there is no wgmma, a bound of one warp says so: see launch_wgmma_of().
template <int dtype, class Cell, int octets>
__global__ void __launch_bounds__(wgmma_exists ? 32 * most_warps(warp_layout<Cell>(false), octets, false) : 32, 1)
    recurrence_forward_wgmma(const ForwardLaunch q) {
  if constexpr (wgmma_exists) run_forward<dtype, Cell, octets, false, true>(q);
}

// The kernel of a tiling's variant.
template <int dtype, class Cell>
const char* launch_forward_of(const ForwardLaunch& q, const Grid& grid) {
  constexpr WarpLayout layout = warp_layout<Cell>(false);
  constexpr int element = product_shape(dtype).element;
  const Geometry& g = q.geometry;
  if constexpr (is_compiled(layout, element, 1, true))
    if (g.place == in_registers) return launch(&recurrence_forward<dtype, Cell, 1, true>, grid, q);
  if (g.octets == 1) return launch(&recurrence_forward<dtype, Cell, 1, false>, grid, q);
  if constexpr (is_compiled(layout, element, 8, false))
    if (g.octets == 8) return launch(&recurrence_forward<dtype, Cell, 8, false>, grid, q);
  if constexpr (is_compiled(layout, element, 4, false))
    if (g.octets == 4) return launch(&recurrence_forward<dtype, Cell, 4, false>, grid, q);
  return launch(&recurrence_forward<dtype, Cell, 2, false>, grid, q);
}

template <int dtype>
const char* launch_forward(const ForwardLaunch& q, const Grid& grid) {
  return dispatch_cell(q.p.cell, q.p.cap, [&](auto cell) { return launch_forward_of<dtype, decltype(cell)>(q, grid); });
}

template <int dtype, class Cell>
const char* launch_wgmma_of(const ForwardLaunch& q, const Grid& grid) {
  constexpr WarpLayout layout = warp_layout<Cell>(false);
  auto kernel = &recurrence_forward_wgmma<dtype, Cell, 4>;
  if constexpr (is_compiled(layout, product_shape(dtype).element, 8, false))
    if (q.geometry.octets == 8) kernel = &recurrence_forward_wgmma<dtype, Cell, 8>;
  int threads;
  if (const char* problem = most_threads(kernel, &threads)) return problem;
  return grid.threads > threads ? "wgmma needs kernels compiled for sm_90a" : launch(kernel, grid, q);
}

template <int dtype>
const char* launch_forward_wgmma(const ForwardLaunch& q, const Grid& grid) {
  return dispatch_cell(q.p.cell, q.p.cap, [&](auto cell) { return launch_wgmma_of<dtype, decltype(cell)>(q, grid); });
}

}   // namespace stable_rnn
