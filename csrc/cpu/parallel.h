// A team of threads over OpenMP: its ranks, a barrier light enough for every time step, and even shares of a range.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "amx.h"
#include "crowd.h"
#include "isa.h"

namespace stable_rnn {
namespace STABLE_RNN_NS {

// A thread's view of its team. Rank and size change at a barrier where threads leave: shares are to be asked for after each.
struct Team {
  int rank = 0, size = 1;
  Barrier* barrier = nullptr;
  uint32_t round = 0;   // barriers that this thread has passed,
  int64_t all = 0;      // arrivals in them,
  int parted = 0;       // and partings among them

  // The last to arrive opens the round for the others, which spin for a few microseconds and then wait in a manner that leaves the
  // core to somebody else. `even`: all had about the same to do. A thread may not come back from here: it has left the body.
  void sync(bool even = true) {
    if (size == 1) return;
    all += size;
    const int64_t arrived = __atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL);
    const uint32_t now = round++;
    if (arrived == all) return __atomic_store_n(&barrier->round, round, __ATOMIC_RELEASE);
    if (arrived == (all | Barrier::sleeping)) barrier->open_late(now, rank, size, even);
    else wait(now);
    if (barrier->partings[parted].left) part();
  }
  // This thread's share of 0 .. n-1.
  int64_t begin(int64_t n) const { return n * rank / size; }
  int64_t end(int64_t n) const { return n * (rank + 1) / size; }

 private:
  void wait(uint32_t now) const {
    for (int spins = 0; __atomic_load_n(&barrier->round, __ATOMIC_ACQUIRE) == now; ++spins) {
      if (spins == 200) return barrier->wait_long(now, all);
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }
  // The opener of the last round leaves, and the highest ranks; the highest of those who stay takes a low rank that became free.
  void part() {
    const int leaver = barrier->partings[parted].leaver;
    size = barrier->partings[parted++].left;
    if (rank == leaver || rank > size || (rank == size && leaver > size)) leave_team();
    if (rank == size) rank = leaver;
  }
};

// body(Team&) on up to `threads` threads; OpenMP may grant fewer, and a team may lose some: a body asks it for the size.
// `judged`: the threads have equal shares up to each barrier (but for those that say otherwise), and end with one.
template <class Body>
void parallel(int threads, bool judged, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
    Barrier barrier(judged);
#pragma omp parallel num_threads(threads)
    {
      try {
        Team team;
        team.rank = omp_get_thread_num();
        team.size = omp_get_num_threads();
        team.barrier = &barrier;
        body(team);
      } catch (const Left&) {}
      release_tiles();
    }
    barrier.finish(threads);
    return;
  }
#endif
  (void)threads, (void)judged;
  Team alone;
  body(alone);
  release_tiles();
}

// 0, 1, 2, ... handed out to whichever thread comes next.
struct Counter {
  alignas(64) int64_t value = 0;
  int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

}   // namespace STABLE_RNN_NS
}   // namespace stable_rnn
