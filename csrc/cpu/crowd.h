// Teams of threads on cores that other programs use too. A team that meets after every step is as slow as the thread whose core was
// taken away: for milliseconds, where a step takes microseconds. So the team's barrier keeps account of long waits, and once they
// have cost more than the threads gained, those who came late leave the team, which goes on without them. Later calls start with as
// many threads as were left, for a while.
//
// Nothing here is inline: kernels of several instruction sets share it.
#pragma once
#include <cstdint>

namespace stable_rnn {

int64_t nanoseconds();   // of a clock that only goes forward

// What the calls of a process know about its cores. Times are those of nanoseconds(). Any thread may call any function.
struct Crowd {
  int limit = 0;       // threads to start with
  int64_t until = 0;   // this long; 0: as many as one likes
  int64_t pause = 0;   // how long that was from the start
  int waits = 0;       // long waits that calls too short to tell have handed on, and the time they lost
  int64_t lost = 0;

  int threads(int wanted, int64_t now) const;
  void collapsed(int left, int64_t lost, int64_t now);   // a team that had lost this time went on with `left` threads
  void kept(int waits, int64_t lost, int64_t now);       // a team kept its threads; what its waits cost beyond the gain
};

int uncrowded(int threads);   // how many threads a team should start with
Crowd crowd();                // for tests and people
// For tests: whoever opens round `round` of a call leaves its team, and again as many rounds later; -1: nobody. Forgets what was known,
// but for the length of the last pause.
void leave_at(int round, int64_t pause);

[[noreturn]] void leave_team();
struct Left {};   // what it throws

// Where a team of threads meets; the hot half of it is Team::sync.
struct Barrier {
  static constexpr int64_t sleeping = int64_t(1) << 62;
  alignas(64) int64_t arrived = 0;   // how often, in all rounds, and whether somebody sleeps until the round is opened
  alignas(64) uint32_t round = 0;    // rounds opened so far
  struct {
    int left, leaver;   // how many threads went on, 0: nobody has left yet; the rank of the one that opened that round
  } partings[32] =
      {};   // in order. A thread that leaves reads its own parting, perhaps while the others are at the next

  explicit Barrier(bool judged);   // whether its teams have equal shares, so that a long wait tells of a taken core
  void wait_long(uint32_t round, int64_t all);
  void open_late(uint32_t round, int rank, int size, bool even);   // by the last to arrive, where somebody sleeps
  void finish(int size);

 private:
  bool judged;
  int countdown;   // leave_at
  alignas(64) int64_t start,
      lost;                  // of the account: when it began, how much of the time since then was lost in long waits
  int waits, parted = 0;     // how many; partings so far
  uint32_t marked = 0;       // the round after the last long wait, and when it was opened
  int64_t mark, since = 0;   // since when somebody sleeps
};

}   // namespace stable_rnn
