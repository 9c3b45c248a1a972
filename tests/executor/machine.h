// What executor.cpp (launching, scheduling) and primitives.cpp (what threads call) share.
#pragma once
#include <cstring>
#include <map>
#include <vector>

#include "device.cuh"
#include "fiber.h"

namespace stable_rnn::executor {

constexpr int WARP = 32;
constexpr unsigned char POISON = 0xff;   // four or two of them are a NaN

struct Barrier {
  unsigned round = 0;
  int arrived = 0, expected = 0;

  void arrive() {
    if (++arrived == expected) {
      arrived = 0;
      ++round;
    }
  }
};

struct Operands {   // of one lane in a collective; results go where they came from
  uint64_t* value;
  int source;
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

struct Warp {
  Barrier barrier;
  const char* collective;   // that its lanes are in
  Operands lanes[WARP];
  uint64_t issued;   // a digest of its wgmma: those of a warpgroup agree
};

struct Transactions {   // of a barrier: transactions_begin()
  int count = 0, arrived = 0;
  int64_t bytes = 0;   // expected and yet to come; below zero where they come first
  unsigned phase = 0;
  unsigned ended[2] = {
      0, 1};   // by parity: whether the phase before the one at hand has it. Who is late by two finds it as it was

  void end_phase() {
    if (arrived < count || bytes) return;
    arrived = 0;
    ++phase;
    ended[phase % 2] = 0;
    ended[(phase + 1) % 2] = 1;
  }
};

struct Block {
  Barrier barrier;
  Barrier* cluster;
  char* shared;
  size_t bytes;
  int running;
  bool begun;
  std::map<size_t, Transactions> transactions;   // by their barriers' offsets in shared memory
  std::vector<char> published;                   // shared memory as wgmma finds it
};

struct Store {   // on its way
  Block* block;
  size_t offset, barrier;   // in the block's shared memory
  unsigned char data[16];
};

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
  unsigned char data[16];
};

struct Wgmma {   // under way
  float* d;
  const uint32_t* a;
  uint64_t b;
  int octets;
  Product product;
};

struct Fiber {
  Side side;
  Position position;
  Block* block;
  Warp* warp;
  const unsigned* word;   // waits until *word >= least
  unsigned least;
  const char* at;           // what it waits in
  unsigned cluster_round;   // that ends cluster_wait; 0: has not arrived
  bool ended;
  std::vector<Copy> copies;     // under way
  std::vector<size_t> groups;   // copies before the end of each committed group
  std::vector<Wgmma> wgmmas;
  std::vector<size_t> wgmma_groups;
  std::map<float*, std::vector<float>> sums;   // of wgmmas, by where they come
  bool fenced;                                 // wgmma_fence since the last wait
};

extern Fiber* running;              // null in the scheduler
extern std::vector<Block> blocks;   // that run together
extern std::vector<Store> stores;   // on their way, as they were sent
extern int order;   // in which blocks and threads run: 0 ascending, 1 descending, else the seed of a random one

[[gnu::format(printf, 1, 2)]] void fail(const char* format,
                                        ...);   // ends the launch with a message; a thread does not return from it
void wait(const unsigned* word, unsigned least, const char* at);
void meet(Barrier& barrier, const char* at);
bool lands_at_once(unsigned phase, int rank);
void land(const Store& store);
void pause(const char* at);                                            // until all other threads have had a turn
float element(const uint32_t* fragment, int index, Product product);   // of a lane's registers, in their order
float towards_zero(double sum);

// All lanes of a warp hand in their operands; the last one does the work for all, as the others wait with theirs on their stacks.
template <class Work>
void collective(const char* name, const Operands& operands, Work work) {
  Warp& warp = *running->warp;
  if (warp.barrier.arrived == 0) warp.collective = name;
  if (std::strcmp(warp.collective, name) != 0)
    fail("is at %s, but other lanes of its warp are at %s", name, warp.collective);
  warp.lanes[running->position.thread % WARP] = operands;
  if (warp.barrier.arrived == WARP - 1) work(warp.lanes);
  meet(warp.barrier, name);
}

}   // namespace stable_rnn::executor
