// Blocks are n x 16 row-major, so that a row of a block is one to four vectors and every product with W a sum of broadcasts.
// All matrices advance together through a few phases; the work items of a phase are (matrix, chunk of rows), and the chunks do not
// depend on the number of threads: neither do the sums.
#include "stable_rnn/spectral.h"

#include <cmath>

#include "parallel.h"
#include "simd.h"
#include "small.h"
#include "stable_rnn/params.h"
#include "tiles.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {
namespace {

static_assert(K == SPECTRAL_BLOCK, "small.h is written for the block size");

constexpr int PARTS = K / width;   // vectors in a row of a block
#if defined(__AVX512F__)
constexpr int GROUP = 8;   // rows of W at a time: as many accumulators as there are registers for
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int GROUP = 6;
#else
constexpr int GROUP = 3;
#endif
constexpr int64_t CHUNK = 64, MOST_CHUNKS = 16;

inline uint64_t mixed(uint64_t x) {   // one draw of splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// sum[r] += w[r * stride] * x, where x and every sum are rows of blocks.
STABLE_RNN_INLINE void accumulate(Vec (&sum)[GROUP][PARTS], const float* w, int64_t stride, const float* x) {
  Vec v[PARTS];
  for (int p = 0; p < PARTS; ++p) v[p] = load(x + p * width);
  for (int r = 0; r < GROUP; ++r) {
    const Vec weight(w[r * stride]);
    for (int p = 0; p < PARTS; ++p) sum[r][p] = fma(weight, v[p], sum[r][p]);
  }
}

struct Job {
  SpectralMatrix a;
  double bound;            // in units of `unit` once that is known
  double unit = 1;         // a power of two that keeps the powers of W / unit in range, and is in range itself
  int64_t chunk, chunks;   // rows in a chunk, number of chunks
  float *X, *XT;           // [n, K], [K, n]
  float* Y;                // [m, K]
  float* parts;            // [chunks, n, K] summands of W^T Y
  float* rows;             // [chunks, GROUP, n] rows of W / unit at work
  float* largest;          // [chunks] largest |W|, NaN where there is one
  Small* grams;            // [chunks] summands of Y^T Y
  float C[K][K] = {};      // the update is W -= (Y C) X^T
  double factor = 1;       // or W *= factor
  bool outside = false;
  int64_t near = 0;   // singular values of the block above 0.999 of the bound

  Job(const SpectralMatrix& matrix, double limit) : a(matrix), bound(limit) {
    chunk = (a.rows + MOST_CHUNKS - 1) / MOST_CHUNKS;
    chunk = chunk < CHUNK ? CHUNK : chunk;
    chunks = (a.rows + chunk - 1) / chunk;
  }

  // The bytes that the arrays take; gives them their place if there is a space.
  int64_t place(Workspace* space) {
    const int64_t n = a.cols;
    return place(X, n * K, space) + place(XT, n * K, space) + place(Y, a.rows * K, space) +
           place(parts, chunks * n * K, space) + place(rows, chunks * n * GROUP, space) +
           place(largest, chunks, space) + place(grams, chunks, space);
  }
  template <class T>
  static int64_t place(T*& array, int64_t n, Workspace* space) {
    if (space) array = space->take<T>(n);
    return Workspace::bytes<T>(n);
  }

  int64_t first(int64_t c) const { return c * chunk; }
  int64_t last(int64_t c) const { return (c + 1) * chunk < a.rows ? (c + 1) * chunk : a.rows; }
  template <class T>
  T* at(int64_t i) const {
    return reinterpret_cast<T*>(a.w) + i * a.stride;
  }

  // Rows i .. i+GROUP of W as far as there are, then zeros; times a factor.
  template <class T>
  float* read(int64_t c, int64_t i, float factor) {
    float* out = rows + c * a.cols * GROUP;
    for (int64_t r = 0; r < GROUP; ++r)
      for (int64_t j = 0; j < a.cols; j += width)
        store(out + r * a.cols + j, i + r < last(c) ? load(at<T>(i + r) + j, a.cols - j) * Vec(factor) : Vec(0.f),
              a.cols - j);
    return out;
  }

  template <class T>
  void write(int64_t c, int64_t i, float factor) {
    const float* in = rows + c * a.cols * GROUP;
    for (int64_t r = 0; r < GROUP && i + r < last(c); ++r)
      for (int64_t j = 0; j < a.cols; j += width)
        store(at<T>(i + r) + j, load(in + r * a.cols + j, a.cols - j) * Vec(factor), a.cols - j);
  }

  float* read(int64_t c, int64_t i, float factor) {
    return a.dtype == BF16 ? read<bf16>(c, i, factor) : read<float>(c, i, factor);
  }
  void write(int64_t c, int64_t i, float factor) {
    a.dtype == BF16 ? write<bf16>(c, i, factor) : write<float>(c, i, factor);
  }

  // The largest |W| of a chunk; infinity, or NaN, where there is one.
  void measure(int64_t c) {
    Vec most(0.f), invalid(0.f);
    for (int64_t i = first(c); i < last(c); i += GROUP) {
      const float* w = read(c, i, 1);
      for (int64_t j = 0; j < GROUP * a.cols; j += width) {
        const Vec x = load(w + j, GROUP * a.cols - j);
        most = at_least(most, at_least(x, Vec(0.f) - x));
        invalid = fma(x, Vec(0.f), invalid);
      }
    }
    float values[width], check[width];
    store(values, most);
    store(check, invalid);
    largest[c] = 0;
    for (int k = 0; k < width; ++k) {
      largest[c] = values[k] > largest[c] ? values[k] : largest[c];
      if (check[k] != 0) largest[c] = NAN;
    }
  }

  // The unit, the block with its fresh vectors. False if W is not finite.
  bool begin(uint64_t seed, int64_t fresh) {
    float most = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      if (!std::isfinite(largest[c])) return false;
      most = largest[c] > most ? largest[c] : most;
    }
    int exponent = 0;
    std::frexp(most, &exponent);
    unit = std::ldexp(1.0, exponent < -100 ? -100 : exponent > 100 ? 100 : exponent);
    bound /= unit;
    const float* block = reinterpret_cast<const float*>(a.block);
    fresh = fresh < a.width ? fresh : a.width;
    for (int64_t j = 0; j < a.cols; ++j)
      for (int64_t c = 0; c < K; ++c) {
        const uint64_t random = mixed(mixed(seed) + static_cast<uint64_t>(j * K + c));
        X[j * K + c] = c >= a.width          ? 0
                       : c < a.width - fresh ? block[j * a.width + c]
                                             : (static_cast<int64_t>(random) >> 11) * 0x1p-52f;   // uniform in (-1, 1)
      }
    return true;
  }

  // Y = W X for the rows of a chunk; then the chunk's summand of W^T Y, or of Y^T Y, while the rows are at hand.
  void multiply(int64_t c, bool gram) {
    const int64_t n = a.cols;
    float* part = parts + c * n * K;
    for (int64_t j = 0; j < n * K && !gram; j += width) store(part + j, Vec(0.f));
    for (int64_t i = first(c); i < last(c); i += GROUP) {
      const float* w = read(c, i, 1 / unit);
      Vec y[GROUP][PARTS];
      for (auto& line : y)
        for (Vec& v : line) v = Vec(0.f);
      for (int64_t j = 0; j < n; ++j) accumulate(y, w + j, n, &X[j * K]);
      for (int64_t r = 0; r < GROUP && i + r < last(c); ++r)
        for (int p = 0; p < PARTS; ++p) store(&Y[(i + r) * K + p * width], y[r][p]);
      if (gram) continue;
      for (int64_t j = 0; j < n; ++j)
        for (int p = 0; p < PARTS; ++p) {
          Vec z = load(part + j * K + p * width);
          for (int r = 0; r < GROUP; ++r) z = fma(Vec(w[r * n + j]), y[r][p], z);
          store(part + j * K + p * width, z);
        }
    }
    if (gram) set_gram(&Y[first(c) * K], last(c) - first(c), grams[c]);
  }

  // G = B^T B for `count` rows of a block, in doubles.
  static void set_gram(const float* block, int64_t count, Small& G) {
    std::memset(G, 0, sizeof G);
    constexpr int lanes = width / 2, vectors = K / lanes, at_once = 4;   // rows of G whose sums stay in registers
    typedef double Doubles __attribute__((vector_size(width * 4)));
    double wide[CHUNK][K];
    for (; count > 0; block += CHUNK * K, count -= CHUNK) {
      const int64_t some = count < CHUNK ? count : CHUNK;
      for (int64_t i = 0; i < some; ++i)
        for (int c = 0; c < K; ++c) wide[i][c] = block[i * K + c];
      for (int r = 0; r < K; r += at_once) {
        Doubles sum[at_once][vectors];
        std::memcpy(sum, G[r], sizeof sum);
        for (int64_t i = 0; i < some; ++i) {
          Doubles y[vectors];
          std::memcpy(y, wide[i], sizeof y);
          for (int q = 0; q < at_once; ++q)
            for (int v = 0; v < vectors; ++v) sum[q][v] += wide[i][r + q] * y[v];
        }
        std::memcpy(G[r], sum, sizeof sum);
      }
    }
  }

  static void rotate(float* block, int64_t n, const Small& T) {   // block <- block T
    float narrowed[K][K];
    for (int r = 0; r < K; ++r)
      for (int c = 0; c < K; ++c) narrowed[r][c] = T[r][c];
    for (int64_t j = 0; j < n; ++j) {
      Vec sum[PARTS];
      for (Vec& v : sum) v = Vec(0.f);
      for (int r = 0; r < K; ++r)
        for (int p = 0; p < PARTS; ++p) sum[p] = fma(Vec(block[j * K + r]), load(narrowed[r] + p * width), sum[p]);
      for (int p = 0; p < PARTS; ++p) store(block + j * K + p * width, sum[p]);
    }
  }

  // X = orthonormal basis of the columns of W^T Y: Cholesky of the Gram matrix, twice.
  void orthonormalize() {
    const int64_t n = a.cols;
    for (int64_t j = 0; j < n * K; j += width) {
      Vec sum(0.f);
      for (int64_t c = 0; c < chunks; ++c) sum = sum + load(&parts[c * n * K + j]);
      store(&X[j], sum);
    }
    for (int pass = 0; pass < 2; ++pass) {
      Small G, T;
      set_gram(X, n, G);
      orthogonalizer(G, T);
      rotate(X, n, T);
    }
  }

  // Rayleigh-Ritz in the block: the singular values of W X and what to subtract. Returns the estimate of the norm afterwards.
  double decide(bool scale) {
    const int64_t n = a.cols;
    Small G = {}, E;
    for (int64_t c = 0; c < chunks; ++c)
      for (int i = 0; i < K; ++i)
        for (int j = 0; j < K; ++j) G[i][j] += grams[c][i][j];
    double values[K];
    eigen(G, values, E);
    const double norm = std::sqrt(values[0]);
    outside = norm > bound;
    for (double value : values) near += std::sqrt(value) > 0.999 * bound;
    if (outside && scale) factor = bound / norm;
    if (outside && !scale) {
      for (int k = 0; k < K; ++k) {
        const double s = std::sqrt(values[k]), excess = s > bound ? 1 - bound / s : 0;
        for (int r = 0; r < K; ++r)
          for (int c = 0; c < K; ++c) C[r][c] += E[r][k] * excess * E[c][k];
      }
      for (int64_t j = 0; j < n; ++j)
        for (int c = 0; c < K; ++c) XT[c * n + j] = X[j * K + c];
    }
    rotate(X, n, E);
    float* block = reinterpret_cast<float*>(a.block);
    for (int64_t j = 0; j < n; ++j) std::memcpy(block + j * a.width, &X[j * K], a.width * sizeof(float));
    return unit * (outside ? bound : norm);
  }

  // W *= factor, or W -= (Y C) X^T, for the rows of a chunk.
  void update(int64_t c, bool scale) {
    for (int64_t i = first(c); i < last(c); i += GROUP) {
      float* w = read(c, i, (scale ? factor : 1) / unit);
      if (!scale) subtract(w, i, last(c) - i < GROUP ? last(c) - i : GROUP);
      write(c, i, unit);
    }
  }

  void subtract(float* w, int64_t i, int64_t some) const {
    const int64_t n = a.cols;
    float t[GROUP][K] = {};   // rows of Y C
    for (int64_t r = 0; r < some; ++r)
      for (int k = 0; k < K; ++k)
        for (int c = 0; c < K; ++c) t[r][c] += Y[(i + r) * K + k] * C[k][c];
    for (int64_t j = 0; j < n; j += width) {
      Vec sum[GROUP];
      for (Vec& v : sum) v = Vec(0.f);
      for (int k = 0; k < K; ++k) {
        const Vec x = load(&XT[k * n + j], n - j);
        for (int r = 0; r < GROUP; ++r) sum[r] = fma(Vec(t[r][k]), x, sum[r]);
      }
      for (int r = 0; r < GROUP; ++r) store(w + r * n + j, load(w + r * n + j, n - j) - sum[r], n - j);
    }
  }
};

}   // namespace

const char* spectral_step(const SpectralParams& p) {
  Workspace list, arrays;
  if (!list.allocate(Workspace::bytes<Job>(p.count))) return "out of memory";
  Job* jobs = list.take<Job>(p.count);
  int64_t bytes = 0, items = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    jobs[i] = Job(p.matrices[i], p.bounds[i]);
    items += jobs[i].chunks;
    bytes += jobs[i].place(nullptr);
  }
  if (!arrays.allocate(bytes)) return "out of memory";
  for (int64_t i = 0; i < p.count; ++i) jobs[i].place(&arrays);
  bool finite = true;
  parallel(uncrowded(p.threads), true, [&](Team& team) {
    auto each_item = [&](auto&& work) {
      for (int64_t i = 0, at = 0; i < p.count; at += jobs[i++].chunks)
        for (int64_t c = 0; c < jobs[i].chunks; ++c)
          if (at + c >= team.begin(items) && at + c < team.end(items)) work(jobs[i], c);
      team.sync();
    };
    auto each_job = [&](auto&& work) {
      for (int64_t i = team.begin(p.count); i < team.end(p.count); ++i) work(jobs[i], i);
      team.sync(false);   // matrices differ in size, and are often fewer than the threads
    };
    each_item([](Job& job, int64_t c) { job.measure(c); });
    each_job([&](Job& job, int64_t i) {
      if (job.begin(p.seed + i, p.fresh)) return;
      p.norms[i] = NAN;
      __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    });
    if (!finite) return;
    for (int step = 0; step < p.iterations; ++step) {
      each_item([](Job& job, int64_t c) { job.multiply(c, false); });
      each_job([](Job& job, int64_t) { job.orthonormalize(); });
    }
    each_item([](Job& job, int64_t c) { job.multiply(c, true); });
    each_job([&](Job& job, int64_t i) {
      p.norms[i] = job.decide(p.scale);
      p.near[i] = job.near;
    });
    each_item([&](Job& job, int64_t c) {
      if (job.outside) job.update(c, p.scale);
    });
  });
  return nullptr;
}

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
