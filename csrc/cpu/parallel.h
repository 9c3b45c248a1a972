// A team of threads over OpenMP: its ranks, a barrier light enough for every time step, and even shares of a range.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

#include "isa.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

// The last to arrive opens the gate for the others, which spin, and after a while offer their core to somebody else.
struct Barrier {
  alignas(64) int arrived = 0;
  alignas(64) int round = 0;

  void wait(int size) {
    const int now = __atomic_load_n(&round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; ++spins) {
      if (spins > 200) sched_yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }
};

struct Team {
  int rank = 0, size = 1;
  Barrier* barrier = nullptr;

  void sync() const {
    if (size > 1) barrier->wait(size);
  }
  // This thread's share of 0 .. n-1.
  int64_t begin(int64_t n) const { return n * rank / size; }
  int64_t end(int64_t n) const { return n * (rank + 1) / size; }
};

// body(Team) on up to `threads` threads; OpenMP may grant fewer, so a body asks its team for the size.
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
    return;
  }
#endif
  (void)threads;
  body(Team{});
}

// 0, 1, 2, ... handed out to whichever thread comes next.
struct Counter {
  alignas(64) int64_t value = 0;
  int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

}  // namespace STABLE_RNN_NS
}  // namespace stable_rnn
