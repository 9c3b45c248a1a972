// Launching and scheduling.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <string>

#include "machine.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl stable_rnn_switch
.hidden stable_rnn_switch
.type stable_rnn_switch, @function
stable_rnn_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size stable_rnn_switch, .-stable_rnn_switch
)");
#endif

namespace stable_rnn {
namespace executor {

Position position;
Fiber* running;
std::vector<Block> blocks;
std::vector<Store> stores;
int order = 0;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t FENCE = 0;
#else
constexpr size_t FENCE = 64;   // bytes behind shared memory that must stay as they are
#define ASAN_POISON_MEMORY_REGION(memory, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) static_cast<void>(0)
#endif

CudaLimits limits = {90, 132, 232448, 16};

std::mutex one_launch;
Stacks stacks;
Side scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Barrier> clusters;
void (*thread_body)(const void* call);
const void* thread_call;
bool failed;
thread_local char message[1024];
const unsigned always = 0;
unsigned sweep = 0;   // of schedule() over all fibers
std::minstd_rand chance;

void begin_block(Block& block) {
  block.begun = true;
  ASAN_UNPOISON_MEMORY_REGION(block.shared, block.bytes);
  std::memset(block.shared, POISON, block.bytes + FENCE);
}

void end_block(Block& block) {
  const auto* fence = reinterpret_cast<const unsigned char*>(block.shared + block.bytes);
  if (std::any_of(fence, fence + FENCE, [](unsigned char byte) { return byte != POISON; }))
    fail("its block wrote past its %zu bytes of shared memory", block.bytes);
  if (std::any_of(stores.begin(), stores.end(), [&](const Store& store) { return store.block == &block; }))
    fail("its block ended while stores to it were on their way");
  const size_t warp = (&block - blocks.data()) * (running->position.threads / WARP);
  for (int w = 0; w < running->position.threads / WARP; ++w)
    if (warps[warp + w].issued != warps[warp + w / 4 * 4].issued)
      fail("the warps of a warpgroup differ in their wgmma");
  block.transactions.clear();
  std::memset(block.shared, POISON, block.bytes);   // other blocks of a cluster must not use it any more
  ASAN_POISON_MEMORY_REGION(block.shared, block.bytes);
}

[[noreturn]] void run_thread() {
  begin(scheduler);
  thread_body(thread_call);
  Fiber& fiber = *running;
  if (!fiber.wgmmas.empty()) fail("ends while its wgmma is under way");
  if (--fiber.block->running == 0) end_block(*fiber.block);
  fiber.ended = true;
  switch_to(fiber.side, scheduler, true);
  std::abort();
}

void resume(Fiber& fiber) {
  if (!fiber.block->begun) begin_block(*fiber.block);
  running = &fiber;
  position = fiber.position;
  switch_to(scheduler, fiber.side);
  running = nullptr;
}

void fail_as_all_wait() {
  std::string text = "the kernel hangs, its threads are: ";
  const size_t threads = fibers[0].position.threads, shown = std::min<size_t>(blocks.size(), 4);
  for (size_t b = 0; b < shown; ++b) {
    std::map<std::string, int> places;
    for (size_t i = b * threads; i < (b + 1) * threads; ++i)
      ++places[fibers[i].ended ? "ended" : std::string("in ") + fibers[i].at];
    text += (b ? "; block " : "block ") + std::to_string(fibers[b * threads].position.block) + ":";
    for (const auto& [place, count] : places)
      text += (place == places.begin()->first ? " " : ", ") + std::to_string(count) + " " + place;
  }
  if (shown < blocks.size()) text += "; and " + std::to_string(blocks.size() - shown) + " more blocks";
  fail("%s", text.c_str());
}

// Half of the stores that are on their way to a block, or of all in a random order, or the last one; false where there are none.
bool land_some() {
  if (stores.empty()) return false;
  if (order > 1) {
    std::shuffle(stores.begin(), stores.end(), chance);
    for (size_t half = (stores.size() + 1) / 2; half > 0; --half) {
      land(stores.back());
      stores.pop_back();
    }
    return true;
  }
  const bool reversed = order == 1;
  const auto before = [=](const Store& a, const Store& b) { return reversed ? a.block > b.block : a.block < b.block; };
  const Block* block = std::min_element(stores.begin(), stores.end(), before)->block;
  std::vector<Store> to_it, others;
  for (const Store& store : stores) (store.block == block ? to_it : others).push_back(store);
  if (!reversed) std::reverse(to_it.begin(), to_it.end());   // the last sent lands first
  const size_t half = (to_it.size() + 1) / 2;
  for (size_t i = 0; i < half; ++i) land(to_it[i]);
  if (!reversed) std::reverse(to_it.begin() + half, to_it.end());
  others.insert(others.end(), to_it.begin() + half, to_it.end());
  stores = others;
  return true;
}

bool can_move(const Fiber& fiber) { return !fiber.ended && *fiber.word >= fiber.least; }

// Runs the fibers until all have ended, none can move, or one fails.
void schedule() {
  const size_t count = fibers.size();
  std::vector<size_t> firsts(count / WARP);        // of the warps, as they take turns
  std::vector<unsigned> slowness(firsts.size());   // in random schedules
  for (size_t w = 0; w < firsts.size(); ++w) {
    firsts[w] = w * WARP;
    slowness[w] = chance() % 8;
  }
  for (size_t left = count; left > 0;) {
    bool moved = false;
    ++sweep;
    if (order > 1) std::shuffle(firsts.begin(), firsts.end(), chance);
    for (const size_t w : firsts) {
      if (order > 1 && chance() % 4 == 0) moved |= land_some();
      if (order > 1 && chance() % 8 < slowness[w / WARP]) {   // a turn left out
        moved |= std::any_of(fibers.begin() + w, fibers.begin() + w + WARP, can_move);
        continue;
      }
      for (bool warp_moved = true; warp_moved; moved |= warp_moved) {
        warp_moved = false;
        for (size_t i = w; i < w + WARP; ++i) {
          Fiber& fiber = fibers[order == 1 ? count - 1 - i : i];
          if (!can_move(fiber)) continue;
          resume(fiber);
          if (failed) return;
          warp_moved = true;
          left -= fiber.ended;
        }
      }
    }
    if (!moved && left > 0 && !land_some()) return fail_as_all_wait();
    if (failed) return;
  }
}

// Blocks first .. first + count - 1, interleaved.
void run_together(const Grid& grid, int first, int count) {
  const int threads = grid.threads, cluster = std::max(grid.cluster, 1);
  const auto bytes = static_cast<size_t>(grid.shared_bytes);
  stores.clear();
  clusters.assign(count / cluster, Barrier{0, 0, cluster * threads});
  blocks.resize(count);
  warps.resize(static_cast<size_t>(count) * threads / WARP);
  fibers.resize(static_cast<size_t>(count) * threads);
  for (Warp& warp : warps) warp.barrier = {0, 0, WARP}, warp.issued = 0;
  for (int b = 0; b < count; ++b) {
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, bytes + FENCE)) std::abort();
    blocks[b] = {{0, 0, threads}, &clusters[b / cluster], static_cast<char*>(shared), bytes, threads, false, {}, {}};
    ASAN_POISON_MEMORY_REGION(shared, bytes);
  }
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    const int b = static_cast<int>(i / threads), t = static_cast<int>(i % threads);
    fiber.position = {t, threads, first + b, grid.blocks, cluster, blocks[b].shared};
    fiber.block = &blocks[b];
    fiber.warp = &warps[i / WARP];
    fiber.word = &always;
    fiber.least = 0;
    fiber.cluster_round = 0;
    fiber.ended = false;
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.wgmmas.clear();
    fiber.wgmma_groups.clear();
    fiber.sums.clear();
    fiber.fenced = false;
    prepare(fiber.side, stacks.memory + i * STACK, run_thread);
  }
  schedule();
  for (Block& block : blocks) {
    ASAN_UNPOISON_MEMORY_REGION(block.shared, block.bytes);
    std::free(block.shared);
  }
}

// What the CUDA runtime would answer to such a launch.
const char* check(const Grid& grid) {
  const int cluster = std::max(grid.cluster, 1);
  if (grid.blocks < 1 || grid.threads < 1 || grid.threads > 1024 || grid.blocks % cluster)
    return "invalid configuration argument";
  if (grid.shared_bytes < 0 || grid.shared_bytes > limits.shared_bytes || (cluster > 1 && limits.arch < 90))
    return "invalid argument";
  if (cluster > limits.max_cluster) return "cluster target block count not available";
  if (grid.cooperative && grid.blocks > limits.sms)
    return "too many blocks in cooperative launch";                                  // one block of an SM is certain
  if (grid.threads % WARP) return "the number of threads is not a multiple of 32";   // a rule of device.cuh
  return nullptr;
}

}   // namespace

bool lands_at_once(unsigned phase, int rank) { return order > 1 ? chance() % 2 : (phase + rank + order) % 2; }

void fail(const char* format, ...) {
  int length = 0;
  if (running)
    length = std::snprintf(message, sizeof message, "block %d, thread %d: ", running->position.block,
                           running->position.thread);
  va_list values;
  va_start(values, format);
  std::vsnprintf(message + length, sizeof message - length, format, values);
  va_end(values);
  failed = true;
  if (running) switch_to(running->side, scheduler);
}

void wait(const unsigned* word, unsigned least, const char* at) {
  running->word = word;
  running->least = least;
  running->at = at;
  if (*word < least) switch_to(running->side, scheduler);
}

void pause(const char* at) { wait(&sweep, sweep + 1, at); }

void meet(Barrier& barrier, const char* at) {
  const unsigned next = barrier.round + 1;
  barrier.arrive();
  wait(&barrier.round, next, at);
}

const char* run(const Grid& grid, void (*body)(const void* call), const void* call) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (const char* problem = check(grid)) return problem;
  const int together = grid.cooperative ? grid.blocks : std::max(grid.cluster, 1), batches = grid.blocks / together;
  if (!stacks.reserve(static_cast<size_t>(together) * grid.threads)) return "no memory for so many fibers";
  thread_body = body;
  thread_call = call;
  failed = false;
  chance.seed(order);
  for (int i = 0; i < batches && !failed; ++i)
    run_together(grid, (order == 1 ? batches - 1 - i : i) * together, together);
  return failed ? message : nullptr;
}

}   // namespace executor

const char* cuda_driver_problem() { return nullptr; }
const char* cuda_limits(int device, CudaLimits* found) {
  if (device != 0) return "invalid device ordinal";
  *found = executor::limits;
  return nullptr;
}
const char* cuda_clock(int, double*) { return "the executor has no clock"; }

}   // namespace stable_rnn

// For Python's ctypes. Limits are what cuda_limits() reports and what launches are held to.
extern "C" {
[[gnu::visibility("default")]] void executor_limits(int arch, int sms, int64_t shared_bytes, int max_cluster) {
  stable_rnn::executor::limits = {arch, sms, shared_bytes, max_cluster};
}
[[gnu::visibility("default")]] void executor_schedule(int order) { stable_rnn::executor::order = order; }
}
