// wgmma: what is issued waits with its addresses, and happens at the last moment that the kernel allows.
#include <algorithm>

#include "machine.h"

namespace stable_rnn {
namespace executor {
namespace {

constexpr int ROWS = 16, DEPTH = 16;   // of a warp's a; PTX manual, "Register Fragments for wgmma.mma_async.m64nNk16"

size_t decoded(uint64_t field) { return (field & 0x3fff) << 4; }

// 16 bits of column n and depth k, where wgmma finds them.
uint16_t found(const Block& block, uint64_t b, int n, int k) {
  const size_t along = decoded(b >> 16), across = decoded(b >> 32);
  const size_t at = decoded(b) + n / 8 * across + k / 8 * along + n % 8 * 16 + k % 8 * 2;
  if (block.published.empty()) fail("wgmma of shared memory that no proxy_fence has made known");
  if (at + 2 > block.bytes) fail("wgmma from outside its block's %zu bytes of shared memory", block.bytes);
  uint16_t bits;
  std::memcpy(&bits, block.published.data() + at, 2);
  return bits;
}

// The i-th wgmma of all lanes of a warp. Chunks of 16 k in the order of issue, each sum rounded once.
void multiply_warp(Fiber* lanes, size_t i) {
  const Wgmma& one = lanes[0].wgmmas[i];
  for (int lane = 1; lane < WARP; ++lane)
    if (lanes[lane].wgmmas.size() <= i || lanes[lane].wgmmas[i].b != one.b)
      fail("the lanes of a warp differ in their wgmma");
  double a[ROWS][DEPTH];
  for (int lane = 0; lane < WARP; ++lane)
    for (int e = 0; e < 8; ++e)
      a[lane / 4 + e / 2 % 2 * 8][lane % 4 * 2 + e % 2 + e / 4 * 8] = element(lanes[lane].wgmmas[i].a, e, one.product);
  for (int n = 0; n < 8 * one.octets; ++n) {
    double column[DEPTH];
    for (int k = 0; k < DEPTH; ++k) {
      const uint32_t bits = found(*lanes[0].block, one.b, n, k);
      column[k] = element(&bits, 0, one.product);
    }
    for (int row = 0; row < ROWS; ++row) {
      Fiber& owner = lanes[row % 8 * 4 + n % 8 / 2];
      float& d = owner.sums[owner.wgmmas[i].d][n / 8 * 4 + row / 8 * 2 + n % 2];
      double sum = d;
      for (int k = 0; k < DEPTH; ++k) sum += a[row][k] * column[k];
      d = towards_zero(sum);
    }
  }
}

// Sums that no wgmma under way adds to any more go to their registers.
void write_back(Fiber& fiber) {
  for (auto at = fiber.sums.begin(); at != fiber.sums.end();) {
    auto& [d, values] = *at;
    if (std::any_of(fiber.wgmmas.begin(), fiber.wgmmas.end(), [d = d](const Wgmma& w) { return w.d == d; })) {
      ++at;
      continue;
    }
    const auto* byte = reinterpret_cast<const unsigned char*>(d);
    const size_t bytes = values.size() * sizeof(float);
    if (std::any_of(byte, byte + bytes, [](unsigned char x) { return x != POISON; }))
      fail("wgmma: its sums were written before wgmma_wait");
    std::memcpy(d, values.data(), bytes);
    at = fiber.sums.erase(at);
  }
}

}   // namespace

uint64_t matrix(const void* shared, int along, int across) {
  check_aligned("wgmma_matrix", shared, 16);
  const auto offset = reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(running->block->shared);
  for (const auto bytes : {offset, uintptr_t(along), uintptr_t(across)})
    if (bytes % 16 || bytes >= 1 << 18)
      fail("wgmma_matrix of %zu bytes, which must be a multiple of 16 below 2^18", bytes);
  return offset >> 4 | uint64_t(along >> 4) << 16 | uint64_t(across >> 4) << 32;
}

// A warp at a time, which a device does not ask for.
void publish() {
  collective("proxy_fence", {}, [](const Operands*) {
    Block* first = running->block - cluster_rank();
    for (Block* block = first; block < first + cluster_size(); ++block)
      if (block->begun && block->running) block->published.assign(block->shared, block->shared + block->bytes);
  });
}

void fence_products() { running->fenced = true; }

void issue(float* d, const uint32_t* a, uint64_t b, int octets, Product product) {
  Fiber& fiber = *running;
  if (fiber.position.threads % (4 * WARP)) fail("wgmma in a block that is not made of warpgroups");
  if (!fiber.fenced) fail("wgmma without a wgmma_fence since the last wait");
  auto& values = fiber.sums[d];
  if (values.empty()) {
    values.assign(d, d + 4 * octets);
    std::memset(d, POISON, values.size() * sizeof(float));
  }
  fiber.wgmmas.push_back({d, a, b, octets, product});
  if (fiber.position.thread % WARP == 0) {
    uint64_t& digest = fiber.warp->issued;
    digest = (digest + b + 1) * 0x9e3779b97f4a7c15 + octets;
  }
}

void finish(int pending) {
  Fiber& fiber = *running;
  fiber.fenced = false;
  pause("wgmma_wait");
  const size_t committed = fiber.wgmma_groups.size();
  const size_t ended = committed > static_cast<size_t>(pending) ? committed - pending : 0;
  const size_t landed = ended ? fiber.wgmma_groups[ended - 1] : 0;
  collective("wgmma_wait", {}, [=](const Operands*) {
    Fiber* lanes = running - running->position.thread % WARP;
    for (size_t i = 0; i < landed; ++i) multiply_warp(lanes, i);
    for (Fiber* lane = lanes; lane < lanes + WARP; ++lane) {
      lane->wgmmas.erase(lane->wgmmas.begin(), lane->wgmmas.begin() + landed);
      lane->wgmma_groups.erase(lane->wgmma_groups.begin(), lane->wgmma_groups.begin() + ended);
      for (size_t& end : lane->wgmma_groups) end -= landed;
      write_back(*lane);
    }
  });
}

}   // namespace executor

void wgmma_commit() { executor::running->wgmma_groups.push_back(executor::running->wgmmas.size()); }

}   // namespace stable_rnn
