// The adjoint recursion on lanes, in reverse time: carry = the adjoints of the sums of the step after, times W_hh; plus dy; then the
// cell's vector-Jacobian product.
//
// A group is 16 units times 8 * octets lanes. Its sums run over G H rows of weights, which its warps share (see WarpLayout: an LSTM's four
// take a gate each), and the parts are added in the order of the gates. The sums change hands through shared memory, so that threads then
// hold consecutive units of a lane (what they load and store is contiguous), the cells of a group spread over its warps.
// The adjoint of the cell state stays in registers from stage to stage, and so does c, which is the next stage's c_prev before it.
//
// A stage of M lanes: 2 M G H^2 operations; M S H values of what was saved (an RNN: M H of y), M G H of dz, M H of dy, 4 M H bytes of
// cells; and the weights from where they stay. README.md has the floors.
#pragma once
#include "recurrence_launch.h"
#include "recurrence_weights.cuh"
#include "team.cuh"

namespace stable_rnn {

template <int dtype, class Cell, int octets>
struct BackwardWarp {
  using A = Arithmetic<dtype>;
  using Storage = typename A::Storage;
  using Real = typename A::Real;
  static constexpr WarpLayout layout = warp_layout<Cell>(true);
  static constexpr int gates = Cell::gates, warps = layout.warps, group_units = layout.units;
  static constexpr int cells = 4 * octets / warps,
                       lanes = 8 * octets / warps;   // of a thread, and of a warp, once the sums have moved
  static constexpr int pitch_of_sums = 9, sums_of_octet = 16 * pitch_of_sums;
  static constexpr int gate_bytes = group_units * A::shape.element;   // of a lane in the outbox

  const BackwardParams& p;
  const Geometry& geometry;
  const TileLanes& tile;
  const int H, part, lane,
      unit;          // part: of the sums; lane, unit: the thread's first cell, then lanes lane + 2, lane + 4, ...
  const float cap;   // as what was saved was rounded
  float sums[1][octets][4];
  float carry[cells], dz[cells][gates];
  float dc[cells], c[cells];
  Storage dy[cells], saved[cells][Cell::saved ? Cell::saved : 1], y[cells];   // of the next stage
  float c_prev[cells];
  Storage y_prev[cells];
  float kept_carry[cells];   // what h_before adds to the next carry

  __device__ __forceinline__ BackwardWarp(const BackwardParams& p, const Geometry& geometry, const TileLanes& tile,
                                          int rank)
      : p(p), geometry(geometry), tile(tile), H(static_cast<int>(p.hidden)), part(thread_index() / 32 % warps),
        lane(group() / geometry.groups * (8 * octets) + part * lanes + thread_index() % 32 / 16),
        unit(rank * geometry.units + group() % geometry.groups * group_units + thread_index() % 16),
        cap(Storage(p.cap)) {}

  __device__ __forceinline__ static int group() { return thread_index() / 32 / warps; }
  __device__ __forceinline__ int first_lane() const { return lane - thread_index() % 32 / 16; }   // of the warp's cells
  __device__ __forceinline__ int first_of_product() const { return first_lane() - part * lanes; }
  __device__ __forceinline__ char* outbox() const {
    return shared_memory() + geometry.outbox + thread_index() / 32 * geometry.outbox_of_warp;
  }

  // body(j, lane) for this thread's cells
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
    for (int j = 0; j < cells; ++j) body(j, lane + 2 * j);
  }

  __device__ __forceinline__ int64_t row(const Span& span, int s) const { return row_at(span, s, -p.lanes.step); }

  // The first carry, and what stays in registers.
  __device__ __forceinline__ void start() {
    each([&](int j, int lane) {
      const Run& run = tile.runs[lane];
      const bool there = run.steps && unit < H;
      carry[j] = there ? start_value<Storage>(run, p.dh_n, p.dh_init, H, unit) : 0.f;
      if constexpr (Cell::h_before) kept_carry[j] = 0.f;
      if constexpr (Cell::has_cell) {
        dc[j] = there ? start_value<Storage>(run, p.dc_n, p.dc_init, H, unit) : 0.f;
        c_prev[j] = there ? p.cells[run.first * H + unit] : 0.f;   // load(0) makes it c
      }
    });
  }

  __device__ __forceinline__ void load(int s) {
    each([&](int j, int lane) {
      const Span span = tile.spans[lane];
      const bool there = s < span.steps && unit < H;
      const int64_t at = row(span, s);
      dy[j] = there && p.dy ? static_cast<const Storage*>(p.dy)[at * H + unit] : Storage(0.f);
      const Storage* from = static_cast<const Storage*>(p.saved) + at * Cell::saved * H + unit;
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) saved[j][i] = there ? from[i * H] : Storage(0.f);
      if constexpr (Cell::h_after) y[j] = there ? static_cast<const Storage*>(p.y)[at * H + unit] : Storage(0.f);
      if constexpr (Cell::has_cell) c[j] = c_prev[j];
      if constexpr (Cell::has_cell || Cell::h_before) {
        if (!there) return;
        if (s + 1 == span.steps && tile.runs[lane].last) {   // the row's first time
          const int64_t first = tile.runs[lane].b * H + unit;
          if constexpr (Cell::h_before) y_prev[j] = p.h0 ? static_cast<const Storage*>(p.h0)[first] : Storage(0.f);
          if constexpr (Cell::has_cell)
            c_prev[j] = p.c0 ? static_cast<float>(static_cast<const Storage*>(p.c0)[first]) : 0.f;
        } else {
          const int64_t before = row(span, s + 1) * H + unit;
          if constexpr (Cell::h_before) y_prev[j] = static_cast<const Storage*>(p.y)[before];
          if constexpr (Cell::has_cell) c_prev[j] = p.cells[before];
        }
      }
    });
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < octets; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][n][e] = 0.f;
  }

  __device__ __forceinline__ float* sums_of(int part, int octet) const {
    return reinterpret_cast<float*>(shared_memory() + geometry.sums) +
           ((group() * warps + part) * octets + octet) * sums_of_octet;
  }

  // The sums go to the threads that have their cells.
  __device__ __forceinline__ void exchange() {
    const int g = thread_index() % 32 / 4, t = thread_index() % 4;
#pragma unroll
    for (int n = 0; n < octets; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_of(part, n)[(g + e / 2 * 8) * pitch_of_sums + 2 * t + e % 2] = sums[0][n][e];
    if constexpr (warps > 1) block_sync();
    else warp_sync();
    each([&](int j, int lane) {
      const int column = lane - first_of_product(), at = thread_index() % 16 * pitch_of_sums + column % 8;
      float sum = sums_of(0, column / 8)[at];
#pragma unroll
      for (int q = 1; q < warps; ++q) sum += sums_of(q, column / 8)[at];
      carry[j] = sum;
      if constexpr (Cell::h_before) carry[j] += kept_carry[j];
    });
  }

  // Nothing goes on to the time before from a stage whose step began anew.
  __device__ __forceinline__ void end_anew(int stage) {
    if (!p.lanes.resets) return;
    each([&](int j, int lane) {
      if (!tile.begins_anew(p.lanes, lane, stage)) return;
      carry[j] = 0.f;
      if constexpr (Cell::has_cell) dc[j] = 0.f;
    });
  }

  // Adjoints as stage s finds them: of lanes that begin to write, and of those that have no step left.
  __device__ __forceinline__ void write_borders(int s) const {
    const auto write = [&](const Run& run, float x, float* start, float* end, void* at_zero) {
      if (s == run.warm && start) start[run.id * H + unit] = x;
      if (s == run.steps && end) end[run.id * H + unit] = x;
      if (s == run.steps && run.last && at_zero) static_cast<Storage*>(at_zero)[run.b * H + unit] = Storage(x);
    };
    each([&](int j, int lane) {
      const Run& run = tile.runs[lane];
      if (run.steps == 0 || unit >= H) return;
      write(run, carry[j], p.dh_start, p.dh_end, p.dh0);
      if constexpr (Cell::has_cell) write(run, dc[j], p.dc_start, p.dc_end, p.dc0);
    });
  }

  __device__ __forceinline__ float whole(int j) const { return carry[j] + float(dy[j]); }   // the adjoint of h

  // From the carry of stage s to dz. What others need goes to the outbox.
  __device__ __forceinline__ void advance(int s) {
    each([&](int j, int lane) {
      const Cell cell(p.cell, cap);
      State<Real> d{whole(j), 0.f}, after{0.f, 0.f}, before{0.f, 0.f};
      if constexpr (Cell::has_cell) d.c = dc[j], after.c = c[j], before.c = c_prev[j];
      if constexpr (Cell::h_after) after.h = float(y[j]);
      if constexpr (Cell::h_before) before.h = float(y_prev[j]);
      if (tile.begins_anew(p.lanes, lane, s)) before = {0.f, 0.f};
      Saved<Cell, Real> kept;
#pragma unroll
      for (int i = 0; i < Cell::saved; ++i) kept[i] = float(saved[j][i]);
      const auto adjoint = cell.vjp(d, kept, after, before);
      if constexpr (Cell::has_cell) dc[j] = number(adjoint.before.c);
      if constexpr (Cell::h_before) kept_carry[j] = number(adjoint.before.h);
#pragma unroll
      for (int q = 0; q < gates; ++q) {
        dz[j][q] = number(adjoint.z[q]);
        const float d_sum = number(cell.hidden(q, adjoint.z[q], kept));
        const int at = Team<false>::in_outbox<lanes>(thread_index() % 32 / 16 + 2 * j,
                                                     q * gate_bytes + thread_index() % 16 * A::shape.element);
        put_element<A>(outbox() + at, unit < H ? d_sum : 0.f);   // never NaN
      }
    });
  }

  __device__ __forceinline__ void send(Team<false>& team) const {
    warp_sync();
    constexpr int quads = gate_bytes / 16;
    team.template send<lanes, gates * quads>(outbox(), [&](int row, int quad) {
      const int column = (unit - thread_index() % 16) * A::shape.element + quad % quads * 16;
      const int at = (first_lane() + row) * geometry.pitch + quad / quads * geometry.segment;
      return column < geometry.segment ? at + A::place_of(first_lane() + row, column) : -1;
    });
  }

  __device__ __forceinline__ void write(int s) const {
    each([&](int j, int lane) {
      const Span span = tile.spans[lane];
      if (s < span.warm || s >= span.steps || unit >= H) return;
      const int64_t at = row(span, s);
      if (p.dz) {
        Storage* to = static_cast<Storage*>(p.dz) + at * gates * H + unit;
#pragma unroll
        for (int q = 0; q < gates; ++q) to[q * H] = Storage(dz[j][q]);
      }
      if (p.dh) static_cast<Storage*>(p.dh)[at * H + unit] = Storage(whole(j));
      if constexpr (Cell::forgets >= 0)
        if (p.decay)
          multiply_decay(p.decay + tile.runs[lane].id * H + unit, s == span.warm, tile.begins_anew(p.lanes, lane, s),
                         float(saved[j][Cell::forgets]));
    });
  }
};

template <int dtype, class Cell, int octets, bool held>
__global__ void __launch_bounds__(32 * most_warps(warp_layout<Cell>(true), octets, held), 1)
    recurrence_backward(const BackwardLaunch q) {
  using Warp = BackwardWarp<dtype, Cell, octets>;
  using A = typename Warp::A;
  const Geometry& g = q.geometry;
  Team<false> team(g, q.meeting);
  const TileLanes tile(g);
  Warp warp(q.p, g, tile, team.rank);
  const BlockWeights<A, 1> weights(g, q.weights, team.rank, thread_index() / 32 % (g.groups * Warp::warps));
  HeldWeights<A, 1> registers;
  if constexpr (held) registers.load(weights.global(), g.chunks);
  const int first_state = warp.first_of_product() * g.pitch + warp.part * (Warp::layout.own_gates * g.segment) +
                          A::first_state(thread_index() % 32, g.pitch);
  const bool starts = q.p.dh_start || q.p.dc_start;
  team.begin();

  for (int64_t first = int64_t(team.index) * g.lanes; first < q.entries; first += int64_t(g.teams) * g.lanes) {
    const Extent extent = tile.load<true>(q.p.lanes, first, q.entries, q.p.dh_init != nullptr);
    warp.start();
    warp.load(0);
    for (int s = 0; s <= extent.most; ++s) {
      if (s > 0) {
        warp.clear();
        const char* state = team.state() + first_state;
        if constexpr (held) product<A>(warp.sums, registers, g.chunks, state, g.pitch);
        else if (g.place == in_shared) product<A>(warp.sums, weights.shared(), g.chunks, state, g.pitch);
        else product<A>(warp.sums, weights.global(), g.chunks, state, g.pitch);
        warp.exchange();
        warp.end_anew(s - 1);
      }
      if (starts || s >= extent.least) warp.write_borders(s);
      warp.advance(s);
      warp.send(team);
      team.arrive();
      warp.write(s);
      warp.load(s + 1);
      tile.template load_resets<true>(q.p.lanes, s + 2);
      team.wait();
    }
  }
}

// The kernel of a tiling's variant.
template <int dtype, class Cell>
const char* launch_backward_of(const BackwardLaunch& q, const Grid& grid) {
  constexpr WarpLayout layout = warp_layout<Cell>(true);
  constexpr int element = product_shape(dtype).element;
  const Geometry& g = q.geometry;
  if constexpr (is_compiled(layout, element, 1, true))
    if (g.place == in_registers) return launch(&recurrence_backward<dtype, Cell, 1, true>, grid, q);
  if (g.octets == 1) return launch(&recurrence_backward<dtype, Cell, 1, false>, grid, q);
  if constexpr (is_compiled(layout, element, 4, false))
    if (g.octets == 4) return launch(&recurrence_backward<dtype, Cell, 4, false>, grid, q);
  return launch(&recurrence_backward<dtype, Cell, 2, false>, grid, q);
}

template <int dtype>
const char* launch_backward(const BackwardLaunch& q, const Grid& grid) {
  return dispatch_cell(q.p.cell, q.p.cap,
                       [&](auto cell) { return launch_backward_of<dtype, decltype(cell)>(q, grid); });
}

}   // namespace stable_rnn
