// C (m, n) = A (m, k) B (k, n), or C += A B, for the gradients of inputs and weights: dx = dz W_ih, dW = dz^T x over all times.
// Two numbers: 2 m k n operations; 4 (m k + k n + m n) bytes, k n and, stored (k, m), m k twice, as they are packed first.
//
// B is packed into panels, as weights are, in slices of k: their sums are added to C one after the other, which keeps rounding errors of
// long sums small. Where A is stored (k, m), k is long (all times): of B one slice at a time is packed, and stays in the cache, while
// tiles of A^T are turned into rows. A sum's order is that of k, slice by slice, whatever the tiles and threads.
#include "kernels.h"
#include "tiles.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

constexpr int64_t slice = 256, tile_rows = 32 * block_rows;

// to[r * stride + j] = a[j * ld + r]: `rows` columns of a, each with k values, become rows.
void turn(const float* a, int64_t ld, int64_t rows, int64_t k, float* to, int64_t stride) {
  for (int64_t j = 0; j < k; j += width)
    pack_transposed<float>(a + j * ld, ld, k - j < width ? k - j : width, rows, to + j, stride);
}

}   // namespace

const char* product(const ProductParams& p) {
  constexpr double worth_a_start = 100000;   // multiply-adds that pay for waking a thread, as for a Tiling
  const double useful = double(p.rows) * double(p.inner) * double(p.columns) / worth_a_start;
  const int threads = useful < 2 ? 1 : uncrowded(useful < p.threads ? int(useful) : p.threads);
  const int64_t span = p.transposed && slice < p.inner ? slice : p.inner;   // of k, packed at a time
  const int64_t stride = state_stride(slice), tile_floats = p.transposed ? tile_rows * stride : 0;
  Panels<float> whole(span, p.columns, 1, 1);
  Workspace memory;
  if (!memory.allocate(Workspace::bytes<float>(whole.words()) + Workspace::bytes<float>(threads * tile_floats)))
    return out_of_memory;
  whole.data = memory.take<float>(whole.words());
  float* tiles = memory.take<float>(threads * tile_floats);
  const auto part = [&](int64_t start,
                        int64_t k) {   // the panels of the slice that begins at k, in the span from start
    Panels<float> panels = whole;
    panels.data += (k - start) * whole.vectors * width;
    panels.k = p.inner - k < slice ? p.inner - k : slice;
    return panels;
  };

  parallel(threads, true, [&](Team& team) {
    for (int64_t start = 0; start < p.inner; start += span) {
      const int64_t slices = ceil_div(span, slice), all = slices * whole.count;
      for (int64_t i = team.begin(all); i < team.end(all); ++i) {
        const int64_t k = start + i / whole.count * slice;
        Panels<float> panels = part(start, k);
        pack_columns(panels, i % whole.count, p.b + k * p.columns);
      }
      team.sync();
      const int64_t last = team.end(p.rows);
      for (int64_t first = team.begin(p.rows); first < last; first += tile_rows) {
        const int64_t n = last - first < tile_rows ? last - first : tile_rows;
        for (int64_t k = start; k < start + span && k < p.inner; k += slice) {
          const Panels<float> panels = part(start, k);
          const float* rows = p.a + first * p.inner + k;
          if (p.transposed) {
            float* tile = tiles + team.rank * tile_floats;
            turn(p.a + k * p.rows + first, p.rows, n, panels.k, tile, stride);
            rows = tile;
          }
          for (int64_t i = 0; i < panels.count; ++i)
            multiply(rows, p.transposed ? stride : p.inner, n, panels, i, [&](int64_t r, const Vec* sums) {
              for (int v = 0; v < panels.size(i); ++v) {
                const int64_t at = (panels.first(i) + v) * width, left = p.columns - at;
                float* c = p.c + (first + r) * p.columns + at;
                store(c, k || p.more ? load(c, left) + sums[v] : sums[v], left);
              }
            });
        }
      }
      team.sync();
    }
  });
  return nullptr;
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
