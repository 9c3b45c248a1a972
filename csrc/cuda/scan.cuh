// The linear scans of a cascade's group: s[t] = a[t] s[t-1] + b[t] for every sequence and unit, where a and b need only what is known for
// all times. Time is cut into parts; a thread runs one part of one unit.
//
//   totals  each part as one map s -> a s + b, and each chunk (the parts of a block) as one
//   run     the start of a part from the totals of the chunks before it and of the parts before it in its chunk; then its steps, with outputs
//
// A cell that keeps nothing of its own needs no totals. Composing maps in this order for any batch: a sequence's bits do not depend on
// those beside it. (They do depend on T, by which time is cut.)
//
// Per unit and step, LSTM forward: about 60 operations, twice; bytes in the storage type s: xp 4 s twice and sums 4 x 4 twice; y, before
// s each; saving 4 s + 4 more. It is bound by memory.
#pragma once
#include "approximate.cuh"
#include "stable_rnn/cells.h"
#include "stable_rnn/cuda.h"
#include "stable_rnn/lanes.h"

namespace stable_rnn {

constexpr int scan_threads = 256, scan_least = 16, scan_chunks = 256;   // steps of a part at least, chunks at most

// s -> a s + b; or b, whatever s is (even NaN), where a is negative or -0: gates are not, and -0 stays so times any of them.
struct Map {
  float a, b;
};
constexpr float nothing_of_it = -0.f;   // a of steps before which the state is zero
__device__ __forceinline__ bool forgets_all(Map map) { return copysignf(1.f, map.a) < 0.f; }
__device__ __forceinline__ Map then(Map first, Map next) {
  return forgets_all(next) ? next : Map{next.a * first.a, fma(next.a, first.b, next.b)};
}
__device__ __forceinline__ float apply(Map map, float s) { return forgets_all(map) ? map.b : fma(map.a, s, map.b); }

// Whether the state is zero before the step of a buffer row.
template <class Params>
__device__ __forceinline__ bool begins_anew(const Params& p, int64_t row) {
  return p.resets && p.resets[row];
}

// How a scan is cut: a block has `span` units (a power of two, at most 32) times `parts` parts of `length` steps.
struct ScanCut {
  int span, parts, tiles;
  int64_t length, chunks;
};
inline ScanCut scan_cut(int64_t steps, int64_t units) {
  ScanCut cut{1, 0, 0, 0, 0};
  while (cut.span < 32 && cut.span < units) cut.span *= 2;
  cut.parts = scan_threads / cut.span;
  cut.tiles = int((units + cut.span - 1) / cut.span);
  const int64_t chunk = (steps + scan_chunks - 1) / scan_chunks;   // steps, at least
  cut.length = (chunk + cut.parts - 1) / cut.parts;
  if (cut.length < scan_least) cut.length = scan_least;
  cut.chunks = (steps + cut.length * cut.parts - 1) / (cut.length * cut.parts);
  return cut;
}

template <class Params>
struct ScanLaunch {
  Params p;
  Lanes lanes;   // whole sequences
  ScanCut cut;
  Map* of_parts;    // [chunks][B][parts][units]
  Map* of_chunks;   // [chunks][B][units]
};

// Where a thread is.
struct ScanPlace {
  int64_t b, unit, chunk, first, end;   // the sequence, its unit of the group, steps [first, end) of its part
  int part;
  bool there;   // there is such a unit
  template <class Params>
  __device__ __forceinline__ explicit ScanPlace(const ScanLaunch<Params>& q) {
    const ScanCut& cut = q.cut;
    const int64_t block = block_index();
    unit = block % cut.tiles * cut.span + thread_index() % cut.span;
    b = block / cut.tiles % q.lanes.batch;
    chunk = block / cut.tiles / q.lanes.batch;
    part = thread_index() / cut.span;
    there = unit < q.p.units;
    const int64_t used = length_of(q.lanes, b);
    first = (chunk * cut.parts + part) * cut.length;
    end = first + cut.length < used ? first + cut.length : used;
  }
  template <class Params>
  __device__ __forceinline__ int64_t of_part(const ScanLaunch<Params>& q, int other) const {
    return ((chunk * q.lanes.batch + b) * q.cut.parts + other) * q.p.units + unit;
  }
  template <class Params>
  __device__ __forceinline__ int64_t of_chunk(const ScanLaunch<Params>& q, int64_t other) const {
    return (other * q.lanes.batch + b) * q.p.units + unit;
  }
};

template <int dtype> struct ScanTypes {
  using Storage = float;
  using V = float;
};
template <> struct ScanTypes<BF16> {
  using Storage = Bf16;
  using V = Approximate;
};
template <> struct ScanTypes<F16> {
  using Storage = Half;
  using V = Approximate;
};

// Forward, a sequence's unit over time.
template <class Cell, class Types>
struct ForwardScan {
  using Params = ScanParams;
  using Storage = typename Types::Storage;
  using V = typename Types::V;
  const Params& p;
  const Lanes& lanes;
  const Cell cell;
  int64_t b, unit, column;   // column of [.., H]
  V bias;

  __device__ __forceinline__ ForwardScan(const Params& p, const Lanes& lanes, Cell cell, int64_t b, int64_t unit)
      : p(p), lanes(lanes), cell(cell), b(b), unit(unit), column(p.unit + unit), bias(0.f) {
    if constexpr (Cell::hidden_bias >= 0)
      if (p.hidden_bias) bias = V(float(in(p.hidden_bias)[column]));
  }
  static __device__ __forceinline__ const Storage* in(const void* x) { return static_cast<const Storage*>(x); }
  static __device__ __forceinline__ Storage* out(void* x) { return static_cast<Storage*>(x); }

  __device__ __forceinline__ auto step(int64_t row, State<V> before) const {
    V sums[Cell::gates], x[Cell::gates];
    for (int gate = 0; gate < Cell::gates; ++gate) {
      x[gate] = V(float(in(p.xp)[(row * Cell::gates + gate) * p.hidden + column]));
      sums[gate] = V(p.sums ? p.sums[(row * p.units + unit) * Cell::gates + gate] : 0.f);
    }
    return cell.step(sums, x, bias, before);
  }
  __device__ __forceinline__ float start() const {
    return float(in(Cell::has_cell ? p.c0 : p.h0)[b * p.hidden + column]);
  }
  // What a step does to the state that a unit keeps.
  __device__ __forceinline__ Map map(int64_t t, int64_t) const {
    const int64_t row = row_of(lanes, b, t);
    const auto now = step(row, {V(0.f), V(0.f)});
    V kept[Cell::saved ? Cell::saved : 1];
    now.save(kept);
    const float a = begins_anew(p, row) ? nothing_of_it : number(kept[Cell::forgets]);
    if constexpr (Cell::has_cell) return {a, number(now.c)};
    else return {a, number(now.h)};
  }
  // What later groups read of the state before a row's step.
  __device__ __forceinline__ void hand_on(int64_t row, Storage h) const {
    out(p.before)[row * p.hidden + column] = begins_anew(p, row) ? Storage(0.f) : h;
  }
  __device__ __forceinline__ void run(int64_t first, int64_t end, int64_t used, float state) const {
    if (first == 0) {
      const Storage h = in(p.h0)[b * p.hidden + column];
      if (used) hand_on(row_of(lanes, b, 0), h);
      else out(p.h_n)[b * p.hidden + column] = h;
      if constexpr (Cell::has_cell)
        if (!used) out(p.c_n)[b * p.hidden + column] = in(p.c0)[b * p.hidden + column];
    }
    for (int64_t t = first; t < end; ++t) {
      const int64_t row = row_of(lanes, b, t);
      if (begins_anew(p, row)) state = 0.f;
      const auto now = step(row, {V(Cell::has_cell ? 0.f : state), V(Cell::has_cell ? state : 0.f)});
      const float value = number(now.h);
      const Storage h(value);
      out(p.y)[row * p.hidden + column] = h;
      if (Cell::saved && p.saved) {
        V kept[Cell::saved ? Cell::saved : 1];
        now.save(kept);
        for (int i = 0; i < Cell::saved; ++i)
          out(p.saved)[(row * Cell::saved + i) * p.hidden + column] = Storage(number(kept[i]));
      }
      state = value;
      if constexpr (Cell::has_cell) {
        state = number(now.c);
        if (p.cells) p.cells[row * p.hidden + column] = state;
      }
      if (t + 1 < used) {
        hand_on(row + lanes.step, h);
        continue;
      }
      out(p.h_n)[b * p.hidden + column] = h;
      if constexpr (Cell::has_cell) out(p.c_n)[b * p.hidden + column] = Storage(state);
    }
  }
};

// Backward, in reverse time: step s is time used - 1 - s, and the state is what the step after hands to s, or to h of a cell that carries.
template <class Cell, class Types>
struct BackwardScan {
  using Params = ScanBackwardParams;
  using Storage = typename Types::Storage;
  const Params& p;
  const Lanes& lanes;
  const Cell cell;
  int64_t b, unit, column;

  __device__ __forceinline__ BackwardScan(const Params& p, const Lanes& lanes, Cell cell, int64_t b, int64_t unit)
      : p(p), lanes(lanes), cell(cell), b(b), unit(unit), column(p.unit + unit) {}
  static __device__ __forceinline__ const Storage* in(const void* x) { return static_cast<const Storage*>(x); }
  static __device__ __forceinline__ Storage* out(void* x) { return static_cast<Storage*>(x); }

  __device__ __forceinline__ auto step(int64_t t, int64_t used, float state, float* kept) const {
    const int64_t row = row_of(lanes, b, t), at = row * p.hidden + column, own = b * p.hidden + column;
    float dh = float(in(p.dy)[at]);
    if (p.sums) dh = dh + p.sums[row * p.units + unit];
    if (t + 1 == used && p.dh_n) dh = dh + float(in(p.dh_n)[own]);
    for (int i = 0; i < Cell::saved; ++i) kept[i] = float(in(p.saved)[(row * Cell::saved + i) * p.hidden + column]);
    State<float> after{0.f, 0.f}, before{0.f, 0.f};
    if constexpr (Cell::h_after) after.h = float(in(p.y)[at]);
    if constexpr (Cell::h_before) before.h = t ? float(in(p.y)[at - lanes.step * p.hidden]) : float(in(p.h0)[own]);
    if constexpr (Cell::has_cell) {
      after.c = p.cells[at];
      before.c = t ? p.cells[at - lanes.step * p.hidden] : float(in(p.c0)[own]);
    }
    if (begins_anew(p, row)) before = {0.f, 0.f};
    return cell.vjp(State<float>{Cell::h_before ? dh + state : dh, Cell::has_cell ? state : 0.f}, kept, after, before);
  }
  __device__ __forceinline__ float start() const {
    return Cell::has_cell && p.dc_n ? float(in(p.dc_n)[b * p.hidden + column]) : 0.f;
  }
  __device__ __forceinline__ Map map(int64_t s, int64_t used) const {
    float kept[Cell::saved ? Cell::saved : 1];
    const int64_t t = used - 1 - s;
    const auto adjoint = step(t, used, 0.f, kept);
    if (begins_anew(p, row_of(lanes, b, t))) return {nothing_of_it, 0.f};
    return {kept[Cell::forgets], Cell::has_cell ? adjoint.before.c : adjoint.before.h};
  }
  __device__ __forceinline__ void run(int64_t first, int64_t end, int64_t used, float state) const {
    for (int64_t s = first; s < end; ++s) {
      const int64_t t = used - 1 - s, row = row_of(lanes, b, t);
      float kept[Cell::saved ? Cell::saved : 1];
      const auto adjoint = step(t, used, state, kept);
      for (int gate = 0; gate < Cell::gates; ++gate) {
        out(p.dz)[(row * Cell::gates + gate) * p.hidden + column] = Storage(adjoint.z[gate]);
        if (t)
          out(p.after)[((row - lanes.step) * p.hidden + column) * Cell::gates + gate] =
              Storage(begins_anew(p, row) ? 0.f : cell.hidden(gate, adjoint.z[gate], kept));
      }
      state = begins_anew(p, row) ? 0.f : Cell::has_cell ? adjoint.before.c : adjoint.before.h;
    }
    if (end < used || (first > 0 && first >= end)) return;   // the part that ends at time 0, or of an empty sequence
    if constexpr (Cell::has_cell) out(p.dc0)[b * p.hidden + column] = Storage(state);
    if constexpr (Cell::h_before) p.dh0[b * p.hidden + column] = state;
  }
};

template <class Cell>
constexpr bool scans = Cell::has_cell || Cell::h_before;

template <template <class, class> class Scan, class Cell, int dtype, class Params>
__global__ void __launch_bounds__(scan_threads) scan_totals(const ScanLaunch<Params> q) {
  const ScanPlace at(q);
  const int64_t used = length_of(q.lanes, at.b);
  Map* totals = reinterpret_cast<Map*>(shared_memory());
  Map total{1.f, 0.f};
  if (at.there) {
    const Scan<Cell, ScanTypes<dtype>> scan(q.p, q.lanes, Cell(q.p.cell, q.p.cap), at.b, at.unit);
    for (int64_t s = at.first; s < at.end; ++s) total = then(total, scan.map(s, used));
    q.of_parts[at.of_part(q, at.part)] = total;
  }
  totals[thread_index()] = total;
  block_sync();
  if (at.part || !at.there) return;
  for (int part = 1; part < q.cut.parts; ++part) total = then(total, totals[part * q.cut.span + thread_index()]);
  q.of_chunks[at.of_chunk(q, at.chunk)] = total;
}

template <template <class, class> class Scan, class Cell, int dtype, class Params>
__global__ void __launch_bounds__(scan_threads) scan_run(const ScanLaunch<Params> q) {
  const ScanPlace at(q);
  const int64_t used = length_of(q.lanes, at.b);
  if (!at.there || (at.first >= used && at.first > 0)) return;
  const Scan<Cell, ScanTypes<dtype>> scan(q.p, q.lanes, Cell(q.p.cell, q.p.cap), at.b, at.unit);
  float state = 0.f;
  if constexpr (scans<Cell>) {
    state = scan.start();
    for (int64_t chunk = 0; chunk < at.chunk; ++chunk) state = apply(q.of_chunks[at.of_chunk(q, chunk)], state);
    for (int part = 0; part < at.part; ++part) state = apply(q.of_parts[at.of_part(q, part)], state);
  }
  scan.run(at.first, at.end, used, state);
}

template <template <class, class> class Scan, class Cell, int dtype, class Params>
const char* launch_scan(const ScanLaunch<Params>& q, void* stream) {
  const Grid grid{int(q.cut.tiles * q.cut.chunks * q.lanes.batch),
                  scan_threads,
                  1,
                  scan_threads * int64_t(sizeof(Map)),
                  false,
                  stream};
  if constexpr (scans<Cell>)
    if (const char* problem = launch(&scan_totals<Scan, Cell, dtype, Params>, grid, q)) return problem;
  return launch(&scan_run<Scan, Cell, dtype, Params>, grid, q);
}

}   // namespace stable_rnn
