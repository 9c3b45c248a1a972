#include "crowd.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <chrono>
#include <climits>
#include <thread>

namespace stable_rnn {
namespace {

constexpr int64_t us = 1000, ms = 1000 * us;
constexpr int64_t least_patience = 20 * us, most_patience = ms;   // a wait beyond is a long one
constexpr int few_waits = 3;                                      // anything may happen that often
constexpr int64_t retry = 20, longest_pause = 5000 * ms;   // a new attempt loses a twentieth of the time, then less

template <class T>
T get(const T& x) {
  return __atomic_load_n(&x, __ATOMIC_RELAXED);
}
template <class T>
void set(T& x, T value) {
  __atomic_store_n(&x, value, __ATOMIC_RELAXED);
}

Crowd known;
int forced = -1;

// A sleeper leaves its core to the thread that it waits for. (Yielding might give it to any other program, for its whole slice.)
void sleep_while(const uint32_t& word, uint32_t value) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  (void)word, (void)value;
  std::this_thread::yield();
#endif
}

void wake(const uint32_t& word) {
#ifdef __linux__
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

}   // namespace

int64_t nanoseconds() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int Crowd::threads(int wanted, int64_t now) const { return now < get(until) ? std::min(wanted, get(limit)) : wanted; }

void Crowd::collapsed(int left, int64_t lost, int64_t now) {
  const int64_t longer = std::min(std::max(retry * lost, 2 * get(pause)), longest_pause);
  set(pause, longer);
  set(limit, left);
  set(until, now + longer);
  set(waits, 0);
  set(this->lost, int64_t(0));
}

void Crowd::kept(int waits, int64_t lost, int64_t now) {
  set(this->waits, lost > 0 ? waits : 0);
  set(this->lost, std::max(lost, int64_t(0)));
  if (lost > 0 || get(pause) == 0 || now < get(until))
    return;   // no proof; nothing was known; these were fewer threads already
  const int64_t shorter = get(pause) / 2;
  set(pause, shorter < ms ? 0 : shorter);
  if (shorter < ms) set(until, int64_t(0));
}

int uncrowded(int threads) { return get(known.until) == 0 ? threads : known.threads(threads, nanoseconds()); }

Crowd crowd() {
  Crowd copy;
  copy.limit = get(known.limit), copy.until = get(known.until), copy.pause = get(known.pause);
  copy.waits = get(known.waits), copy.lost = get(known.lost);
  return copy;
}

void leave_at(int round, int64_t pause) {
  set(forced, round);
  set(known.until, int64_t(0)), set(known.pause, pause);
  set(known.waits, 0), set(known.lost, int64_t(0));
}

void leave_team() { throw Left{}; }

Barrier::Barrier(bool judged)
    : judged(judged), countdown(get(forced)), lost(judged ? get(known.lost) : 0), waits(judged ? get(known.waits) : 0) {
  mark = nanoseconds();
  start = mark - lost;
  if (countdown >= 0) arrived = sleeping;
}

void Barrier::wait_long(uint32_t now, int64_t all) {
  const auto closed = [&] { return __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; };
  // Even equal shares differ by one panel: the others may need twice as long as this thread did.
  const int64_t from = nanoseconds(), usual = (from - get(mark)) / (int64_t(uint32_t(now - get(marked))) + 1);
  const int64_t patience = std::min(std::max(2 * usual, least_patience), most_patience);
  while (nanoseconds() - from < patience)
    for (int spins = 0; spins < 16; ++spins) {
      if (!closed()) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  // Who arrives last must know of this sleeper. It is too late for that once all have arrived: the round opens at any moment.
  set(since, from);
  int64_t found = get(arrived);
  while (!(found & sleeping) && found < all &&
         !__atomic_compare_exchange_n(&arrived, &found, found | sleeping, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
  const bool known_of = (found & sleeping) || found < all;
  while (closed())
    if (known_of) sleep_while(round, now);
    else std::this_thread::yield();
}

void Barrier::open_late(uint32_t now, int rank, int size, bool even) {
  const int64_t time = nanoseconds(), from = get(since), wait = from ? std::max(time - from, int64_t(0)) : 0;
  set(since, int64_t(0));
  const bool told = countdown == 0;
  if (countdown < 0) __atomic_fetch_and(&arrived, ~sleeping, __ATOMIC_RELAXED);
  else countdown = told ? get(forced) : countdown - 1;
  if (judged && even) ++waits, lost += wait;
  else start += wait;
  set(mark, time);
  set(marked, now + 1);
  // A thread gains what the others would have needed longer without it, 1 / (size - 1) of the time not lost, and all of them together
  // (size - 1) times that time.
  const int64_t used = time - start - lost, others = size - 1;
  if (told || (waits >= few_waits && lost * others > used)) {
    const int left = !told && lost > used * others ? 1 : std::max(size - (1 << parted), 1);
    known.collapsed(left, lost, time);
    partings[parted++] = {left, rank};
    start = time, lost = 0, waits = 0;
  }
  __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
  wake(round);
}

void Barrier::finish(int size) {
  if (!judged || parted || (waits == 0 && get(known.pause) == 0 && get(known.waits) == 0)) return;
  const int64_t now = nanoseconds();
  known.kept(waits, lost - (now - start - lost) / (size - 1), now);
}

}   // namespace stable_rnn
