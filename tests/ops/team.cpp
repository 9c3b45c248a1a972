// Teams of csrc/cpu/parallel.h on plain threads, and csrc/cpu/crowd.h with a clock of its own. `team NAME` runs one check; exit status 1:
// it failed.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "parallel.h"

using namespace stable_rnn;
using plain::Team;

namespace {

void sleep_us(int time) { std::this_thread::sleep_for(std::chrono::microseconds(time)); }

int failures = 0;

void expect(bool right, const char* what, long long value) {
  if (!right) ++failures, std::printf("%s: %lld\n", what, value);
}

// `rounds` rounds of a team, each over 97 items; work(thread, round). Returns how many threads stayed to the end.
template <class Work>
int meet(int threads, int rounds, bool judged, const Work& work) {
  constexpr int items = 97;
  std::vector<int> done(size_t(rounds) * items);
  std::vector<int> stayed(threads), ranks(threads), sizes(threads);
  Barrier barrier(judged);
  const auto member = [&](int thread) {
    Team team;
    team.rank = thread, team.size = threads, team.barrier = &barrier;
    try {
      for (int round = 0; round < rounds; ++round) {
        work(thread, round);
        const int* before = round ? &done[(round - 1) * items] : nullptr;   // of other threads, mostly
        for (int64_t i = team.begin(items); i < team.end(items); ++i)
          done[round * items + i] += before ? before[items - 1 - i] : 1;
        team.sync();
      }
      stayed[thread] = 1, ranks[thread] = team.rank, sizes[thread] = team.size;
    } catch (const Left&) {}
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(member, thread);
  member(0);
  for (auto& other : others) other.join();
  barrier.finish(threads);
  int left = 0, sum = 0;
  for (int thread = 0; thread < threads; ++thread) left += stayed[thread], sum += stayed[thread] * ranks[thread];
  for (int thread = 0; thread < threads; ++thread)
    if (stayed[thread]) expect(sizes[thread] == left, "size of the team at the end", sizes[thread]);
  expect(sum == left * (left - 1) / 2, "sum of the ranks", sum);
  if (judged) expect(!(barrier.arrived & Barrier::sleeping), "nobody sleeps any more", barrier.arrived);
  for (int value : done) expect(value == 1, "an item was done other than once", value);
  return left;
}

void told() {   // threads leave at barriers in turn; nobody does of its own accord, so the team is not judged
  for (int threads = 2; threads <= 9; ++threads)
    for (int round : {0, 1, 2, 5, 40}) {
      leave_at(round, 0);
      int left = threads, leaving = 1;
      for (int at = round; at < 60 && left > 1; at += round + 1, leaving *= 2)
        left = left - leaving < 1 ? 1 : left - leaving;
      expect(meet(threads, 60, false, [](int, int) {}) == left, "threads at the end", left);
    }
  leave_at(-1, 0);
}

void late_one(int thread, int) {
  if (thread == 1) sleep_us(2000);
}

void late() {   // one thread is always late: the others sleep, and the team goes on without somebody
  for (int threads : {2, 3, 4}) {
    leave_at(-1, 0);
    const int left = meet(threads, 50, true, late_one);
    expect(left < threads, "threads at the end", left);
    expect(crowd().limit == left && crowd().pause > 0, "known threads", crowd().limit);
  }
  leave_at(-1, 0);
  const int left = meet(3, 20, false, late_one);
  expect(left == 3 && crowd().until == 0, "threads at the end of a team whose shares differ", left);
}

void many() {   // many rounds, at all speeds, more threads than most machines have
  leave_at(-1, 0);
  meet(2, 500, true, [](int, int) {});
  meet(8, 100, false, [](int thread, int round) {
    if ((thread * 7 + round) % 50 == 0) sleep_us(100);
  });
  leave_at(-1, 0);
}

void memory() {   // times in microseconds
  constexpr int64_t us = 1000;
  Crowd known;
  expect(known.threads(8, 0) == 8, "threads where nothing is known", known.threads(8, 0));
  known.collapsed(3, 500 * us, 0);
  expect(known.threads(8, 9999 * us) == 3 && known.threads(2, 9999 * us) == 2, "threads soon after",
         known.threads(8, 9999 * us));
  expect(known.threads(8, 10000 * us) == 8, "threads twenty times as long after", known.threads(8, 10000 * us));
  known.kept(0, 0, 5000 * us);   // with three threads: proves nothing
  expect(known.pause == 10000 * us, "pause", known.pause);

  known.collapsed(1, 100 * us, 10000 * us);   // once more: twice as long
  expect(known.threads(8, 29999 * us) == 1 && known.threads(8, 30000 * us) == 8, "pause", known.pause);
  for (int i = 0; i < 40; ++i) known.collapsed(1, 100 * us, 0);
  expect(known.pause == 5000000 * us, "longest pause", known.pause);
  known.kept(2, 1 * us, known.until);   // lost more than it gained: no proof
  expect(known.pause == 5000000 * us && known.waits == 2 && known.lost == 1 * us, "pause", known.pause);
  known.collapsed(1, 0, 0);
  expect(known.waits == 0 && known.lost == 0, "an account that was closed", known.waits);
  for (int i = 0; i < 20; ++i) known.kept(2, -1 * us, known.until + i);
  expect(known.pause == 0 && known.until == 0 && known.waits == 0 && known.lost == 0, "pause of a quiet machine",
         known.pause);
}

void calls() {   // each too short to tell
  leave_at(-1, 0);
  int call = 0;
  while (call < 50 && crowd().limit == 0) meet(2, 1, true, late_one), ++call;
  expect(crowd().limit == 1, "threads", crowd().limit);
}

}   // namespace

int main(int, char** arguments) {
  const struct {
    const char* name;
    void (*check)();
  } checks[] = {{"told", told}, {"late", late}, {"many", many}, {"memory", memory}, {"calls", calls}};
  for (const auto& one : checks)
    if (!std::strcmp(arguments[1], one.name)) return one.check(), failures != 0;
  return 2;
}
