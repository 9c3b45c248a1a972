// xp = x W_ih^T + b_ih + b_hh: the product of a step, over all times at once.
#include "kernels.h"
#include "tiles.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

template <class T>
const char* project(const InputProjectionParams& p) {
  using S = StateOf<T>;
  constexpr bool convert = sizeof(T) != sizeof(S);
  const auto in = [](const void* x) { return static_cast<const T*>(x); };
  const Tiling tiling(p.threads, p.rows, 1, p.sums, p.sums * p.input);
  Panels<S> panels(p.input, p.sums, 1, tiling.panel_threads());
  const int64_t stride = convert ? state_stride(p.input) : p.input;
  const int64_t tile_size = convert ? tiling.rows * stride : 0;
  Workspace memory;
  if (!memory.allocate(Workspace::bytes<float>(panels.words()) + Workspace::bytes<S>(tiling.teams() * tile_size)))
    return out_of_memory;
  panels.data = memory.take<float>(panels.words());
  S* tiles = memory.take<S>(tiling.teams() * tile_size);
  Counter counter;

  parallel(tiling.threads, tiling.together, [&](Team& team) {
    for (int64_t i = team.begin(panels.count); i < team.end(panels.count); ++i) pack_rows(panels, i, in(p.w_ih));
    team.sync();
    for_each_tile(team, tiling, p.rows, counter, [&](Team& own, int64_t first, int64_t n, int64_t slot) {
      const S* rows = static_cast<const S*>(p.x) + first * p.input;
      if constexpr (convert) {
        S* tile = tiles + slot * tile_size;
        own.sync();   // nobody reads the last tile any more
        for (int64_t r = own.begin(n); r < own.end(n); ++r)
          begin_state(tile + r * stride, p.input, in(p.x) + (first + r) * p.input, nullptr);
        own.sync();
        rows = tile;
      }
      each_panel(own, panels, first / tiling.rows, [&](int64_t i) {
        const int64_t unit = panels.first(i) * width;
        const int size = panels.size(i);
        const auto bias = [&](const void* b, int v) {
          return b ? load(in(b) + unit + v * width, p.sums - unit - v * width) : Vec(0.f);
        };
        Vec b_ih[panel_vectors], b_hh[panel_vectors];
        for (int v = 0; v < size; ++v) b_ih[v] = bias(p.b_ih, v), b_hh[v] = bias(p.b_hh, v);
        multiply(rows, stride, n, panels, i, [&](int64_t r, const Vec* sums) {
          T* xp = static_cast<T*>(p.xp) + (first + r) * p.sums + unit;
          for (int v = 0; v < size; ++v)
            store(xp + v * width, (sums[v] + b_ih[v]) + b_hh[v], p.sums - unit - v * width);
        });
      });
    });
    team.sync();
  });
  return nullptr;
}

}   // namespace

const char* input_projection(const InputProjectionParams& p) {
  return p.dtype == BF16 ? project<bf16>(p) : project<float>(p);
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
