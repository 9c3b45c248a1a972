// What a thread calls: collectives of its warp, barriers, copies, other blocks.
#include <algorithm>
#include <cmath>

#include "machine.h"

namespace stable_rnn {
namespace executor {
float element(const uint32_t* fragment, int index, Product product) {
  if (product == Product::tf32) {
    const uint32_t bits = fragment[index] & 0xffffe000;   // the rest is not read
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  Bf16 bf16;
  Half f16;
  bf16.bits = f16.bits = static_cast<uint16_t>(fragment[index / 2] >> index % 2 * 16);
  return product == Product::bf16 ? float(bf16) : float(f16);
}

float towards_zero(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::isfinite(nearest) && std::fabs(double(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.f) : nearest;
}

namespace {

// Fragments of the PTX manual, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8". A register holds `pack` neighbours along k.
void multiply_warp(const Operands* lanes, Product product) {
  const int pack = product == Product::tf32 ? 1 : 2, half = 4 * pack;
  double a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const int group = lane / 4, first = lane % 4 * pack;
    for (int i = 0; i < 4 * pack; ++i)
      a[group + i / pack % 2 * 8][first + i % pack + i / (2 * pack) * half] = element(lanes[lane].a, i, product);
    for (int i = 0; i < 2 * pack; ++i)
      b[first + i % pack + i / pack * half][group] = element(lanes[lane].b, i, product);
  }
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = lanes[lane].c[i];
      for (int k = 0; k < 2 * half; ++k) sum += a[row][k] * b[k][column];
      lanes[lane].c[i] = towards_zero(sum);
    }
}

constexpr uint64_t BARRIER = 0x5ca1ab1e0ddba11;   // what a barrier of transactions holds

// Where an address lies in its block's shared memory; past the end where it does not.
size_t offset_in(const Block& block, const void* shared) {
  return reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(block.shared);
}

}   // namespace

uint64_t exchange(const char* name, uint64_t value, int source_lane) {
  if (source_lane < 0 || source_lane >= WARP) fail("%s from lane %d", name, source_lane);
  collective(name, {&value, source_lane, nullptr, nullptr, nullptr}, [](const Operands* lanes) {
    uint64_t values[WARP];
    for (int i = 0; i < WARP; ++i) values[i] = *lanes[i].value;
    for (int i = 0; i < WARP; ++i) *lanes[i].value = values[lanes[i].source];
  });
  return value;
}

void multiply(float* c, const uint32_t* a, const uint32_t* b, Product product) {
  constexpr const char* names[] = {"mma (bf16)", "mma (f16)", "mma (tf32)"};
  collective(names[static_cast<int>(product)], {nullptr, 0, c, a, b},
             [=](const Operands* lanes) { multiply_warp(lanes, product); });
}

void load_transposed(uint32_t* words, const void* row) {
  check_aligned("load_transposed", row, 16);
  const Block& block = *running->block;
  const size_t offset = offset_in(block, row);
  if (offset > block.bytes || offset + 16 > block.bytes)
    fail("load_transposed from outside its block's %zu bytes of shared memory", block.bytes);
  uint64_t given[2] = {reinterpret_cast<uintptr_t>(row), 0};
  collective("load_transposed", {given, 0, nullptr, nullptr, nullptr}, [](const Operands* lanes) {
    uint16_t rows[WARP][8];
    for (int i = 0; i < WARP; ++i) std::memcpy(rows[i], reinterpret_cast<const void*>(lanes[i].value[0]), 16);
    for (int lane = 0; lane < WARP; ++lane) {
      uint16_t found[8];
      for (int i = 0; i < 8; ++i) found[i] = rows[i / 2 * 8 + lane % 4 * 2 + i % 2][lane / 4];
      std::memcpy(lanes[lane].value, found, 16);
    }
  });
  std::memcpy(words, given, 16);
}

void check_aligned(const char* name, const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("%s of %d bytes at an address that is not a multiple of that", name, bytes);
}

// The value: 4 bytes, a double, or 4-byte parts of 16.
void check_written(const char* name, const void* value, int bytes) {
  const auto* byte = static_cast<const unsigned char*>(value);
  for (int part = bytes == 16 ? 4 : bytes, at = 0; at < bytes; at += part)
    if (std::all_of(byte + at, byte + at + part, [](unsigned char b) { return b == POISON; }))
      fail("%s of shared memory that was never written", name);
}

void copy(void* shared, const void* global, int bytes) {
  check_aligned("copy_async", shared, bytes);
  check_aligned("copy_async", global, bytes);
  const Block& block = *running->block;
  const size_t offset = offset_in(block, shared);
  if (offset > block.bytes || offset + bytes > block.bytes)
    fail("copy_async to outside its block's %zu bytes of shared memory", block.bytes);
  Copy copy{static_cast<unsigned char*>(shared), global, bytes, {}};
  std::memcpy(copy.data, global, bytes);
  std::memset(shared, POISON, bytes);
  running->copies.push_back(copy);
}

void land(int pending) {
  auto& copies = running->copies;
  auto& groups = running->groups;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  const size_t ended = groups.size() - pending, landed = groups[ended - 1];
  for (size_t i = 0; i < landed; ++i) {
    const Copy& copy = copies[i];
    if (std::memcmp(copy.from, copy.data, copy.bytes)) fail("copy_async: its source was written before copy_wait");
    for (int j = 0; j < copy.bytes; ++j)
      if (copy.to[j] != POISON) fail("copy_async: its destination was written before copy_wait");
    std::memcpy(copy.to, copy.data, copy.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + landed);
  groups.erase(groups.begin(), groups.begin() + ended);
  for (size_t& end : groups) end -= landed;
}

void* map(void* shared, int rank) {
  const Block& mine = *running->block;
  const size_t offset = offset_in(mine, shared);
  if (offset >= mine.bytes)
    fail("cluster_map of an address outside its block's %zu bytes of shared memory", mine.bytes);
  if (rank < 0 || rank >= cluster_size()) fail("cluster_map to rank %d of a cluster of %d", rank, cluster_size());
  return (&mine)[rank - cluster_rank()].shared + offset;
}

Transactions& transactions_of(Block& block, const char* name, size_t barrier) {
  const auto found = block.transactions.find(barrier);
  if (found == block.transactions.end()) fail("%s: no barrier has begun there", name);
  uint64_t word;
  std::memcpy(&word, block.shared + barrier, sizeof word);
  if (word != BARRIER) fail("%s: its barrier was written over", name);
  return found->second;
}

void land(const Store& store) {
  auto* to = reinterpret_cast<unsigned char*>(store.block->shared) + store.offset;
  if (std::any_of(to, to + 16, [](unsigned char byte) { return byte != POISON; }))
    fail("store_async: its destination was written before it landed");
  std::memcpy(to, store.data, 16);
  Transactions& transactions = transactions_of(*store.block, "store_async", store.barrier);
  transactions.bytes -= 16;
  transactions.end_phase();
}

void send(void* to, const void* value, uint64_t* barrier, int rank) {
  check_aligned("store_async", to, 16);
  map(barrier, rank);   // checks both
  Store store{running->block + (rank - cluster_rank()),
              offset_in(*running->block, to),
              offset_in(*running->block, barrier),
              {}};
  if (store.offset > store.block->bytes || store.offset + 16 > store.block->bytes)
    fail("store_async to outside its block's %zu bytes of shared memory", store.block->bytes);
  check_written("store_async", value, 16);
  std::memcpy(store.data, value, 16);
  std::memset(store.block->shared + store.offset, POISON, 16);
  const unsigned phase = transactions_of(*store.block, "store_async", store.barrier).phase;
  if (lands_at_once(phase, rank)) land(store);
  else stores.push_back(store);
}

}   // namespace executor

using namespace executor;

void block_sync() { meet(running->block->barrier, "block_sync"); }
void warp_sync() {
  collective("warp_sync", {}, [](const Operands*) {});
}

void copy_commit() { running->groups.push_back(running->copies.size()); }

void cluster_arrive() {
  if (running->cluster_round) fail("cluster_arrive twice without cluster_wait");
  Barrier& barrier = *running->block->cluster;
  running->cluster_round = barrier.round + 1;
  barrier.arrive();
  pause(
      "cluster_arrive");   // so that some threads are past cluster_wait while others have still to do what lies before it
}
void cluster_wait() {
  if (!running->cluster_round) fail("cluster_wait without cluster_arrive");
  wait(&running->block->cluster->round, running->cluster_round, "cluster_wait");
  running->cluster_round = 0;
}

void transactions_begin(uint64_t* barrier, int count) {
  Block& block = *running->block;
  check_aligned("transactions_begin", barrier, 8);
  const size_t offset = offset_in(block, barrier);
  if (offset > block.bytes || offset + 8 > block.bytes)
    fail("transactions_begin outside its block's %zu bytes of shared memory", block.bytes);
  block.transactions[offset] = Transactions{};
  block.transactions[offset].count = count;
  std::memcpy(barrier, &BARRIER, sizeof BARRIER);
}
void transactions_arrive(uint64_t* barrier, int bytes) {
  Block& block = *running->block;
  Transactions& transactions = transactions_of(block, "transactions_arrive", offset_in(block, barrier));
  if (transactions.arrived == transactions.count) fail("transactions_arrive more than %d times", transactions.count);
  ++transactions.arrived;
  transactions.bytes += bytes;
  transactions.end_phase();
  pause("transactions_arrive");   // as cluster_arrive
}
void transactions_wait(uint64_t* barrier, unsigned parity) {
  Block& block = *running->block;
  if (parity > 1) fail("transactions_wait for a parity of %u", parity);
  wait(&transactions_of(block, "transactions_wait", offset_in(block, barrier)).ended[parity], 1, "transactions_wait");
}

void flag_signal(unsigned* flag, unsigned value) { *flag = value; }
void flag_wait(const unsigned* flag, unsigned at_least) { wait(flag, at_least, "flag_wait"); }

}   // namespace stable_rnn
