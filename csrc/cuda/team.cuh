// A team: the blocks that run a tile together, each with its share of the hidden units, and how a step's new state reaches them all.
//
// The state of a tile lies whole in every block's shared memory, [N][pitch]. A warp collects what it computed in its outbox and sends it
// on, 16 bytes at a time:
//     one block    into the other of two buffers                                                     then a block barrier
//     a cluster    into the other buffer of every block, through distributed shared memory           then a cluster barrier
//     the same     by stores that arrive by themselves (Geometry::brought)                           then a barrier of transactions
//     a grid       into the team's inbox in global memory, which is read back once all flags say so  then block barriers around the flags
// One barrier a step is enough, as states alternate between two buffers: who arrives has read the one that is written next.
//
// Transactions: each buffer has a barrier in each block, whose phase ends once all warps of the block have arrived and all bytes of the
// step have come. Blocks learn of each other by these bytes alone, and that is enough, as every warp whose units are not all beyond the
// last one sends to every block at every step, after its product and after it has waited for the step before:
//     a buffer is free    Step t writes the buffer that products of step t - 1 read. Who sends in step t has the bytes of step t - 1 of all
//                         warps of all blocks, and each of them came after its warp's product, from which they are computed. (A warp whose
//                         units are all beyond the last one may still be reading; nobody uses its sums.)
//     phases do not mix   Step t + 2 uses the barrier of step t again. Its bytes come from warps that have those of step t + 1 of this
//                         block, which were sent after its phase of step t had ended: they count for their own phase, also before thread 0
//                         has said how many to expect. No phase ends before a warp has arrived in it, so none can miss one.
//     between warps       All warps of a block arrive: what they did before is done for who has waited, as with the other barriers.
//     every step sends    as many bytes: lanes that have ended or are masked, and zeros of units beyond the last, too; all blocks of a
//                         team run the same steps, as they find the same extents in the same lanes.
//     a tile's end        Its last step has been waited for, so nothing is on its way when the first state of the next tile is filled in,
//                         into the buffer that this step brought. Others write there in the tile's second step, after its first.
//     the end             A block ends when all that is sent to it has come; its own stores carry their values with them.
// Warpgroups read the state by the async proxy, which sees a thread's stores only after a fence of that thread: before each barrier that
// hands a state over (publish()), whether its bytes went to this block, to another one, or came by copy_async from L2. That the buffer may
// be written again needs no fence: wgmma_wait() ends the reads, which PTX has a fence of its own follow, and the barrier after it is the one
// that all kernels have. Transactions have no thread that could fence what a store brings from afar, so warpgroups do without them.
// Between arrive() and wait() is the place for what others do not wait for: outputs, and the loads of the next step.
#pragma once
#include "recurrence_product.cuh"
#include "tile.cuh"

namespace stable_rnn {

struct Meeting {     // for teams that meet through L2; zeros before the launch
  char* inbox;       // [teams][2][N][pitch]
  unsigned* flags;   // [teams][blocks] the number of steps that a block has sent
};

template <bool grouped>   // warpgroups
class Team {
 public:
  const int index, rank;

  __device__ __forceinline__ Team(const Geometry& g, const Meeting& meeting)
      : index(block_index() / g.blocks), rank(block_index() % g.blocks), g_(g), meeting_(meeting) {}

  // Before the first send: all blocks run, all states are zero (they stay so beyond the last unit).
  __device__ __forceinline__ void begin() {
    Quad* state = reinterpret_cast<Quad*>(shared_memory() + g_.state);
    for (int i = thread_index(); i < g_.buffers * tile_bytes() / 16; i += thread_count()) state[i] = Quad{};
    if (asynchronous() && thread_index() < 2) transactions_begin(barrier(thread_index()), thread_count() / 32);
    warp_sync();
    if (g_.cluster > 1) cluster_sync();   // else the first TileLanes::load has the barrier
  }

  // What this thread has written of states is for all to read after the next barrier.
  __device__ __forceinline__ void publish() const {
    if constexpr (grouped) proxy_fence();
  }

  __device__ __forceinline__ char* state() const {
    return shared_memory() + g_.state + (through_l2() ? 0 : (steps_ & 1) * tile_bytes());
  }

  // Where a column of a row lies in an outbox: [quads][rows], so that threads side by side send what different lanes have of one column,
  // which spreads over the banks (see place_of() of the products).
  template <int rows>
  static __device__ __forceinline__ int in_outbox(int row, int column) {
    return (column / 16 * rows + row) * 16 + column % 16;
  }

  // One warp: `rows` rows of `quads` Quads from its outbox to place(row, quad), an offset in the state, or negative: nowhere.
  template <int rows, int quads, class Place>
  __device__ __forceinline__ void send(const char* outbox, const Place& place) {
    const int peers = through_l2() ? 1 : g_.blocks;
    char* next = shared_memory() + g_.state + (~steps_ & 1) * tile_bytes();
    for (int i = thread_index() % 32; i < rows * quads * peers; i += 32) {
      const int which = i % (rows * quads), at = place(which % rows, which / rows);
      if (at < 0) continue;
      const Quad value = reinterpret_cast<const Quad*>(outbox)[which];
      if (through_l2()) {
        store_l2(reinterpret_cast<Quad*>(inbox(steps_) + at), value);
      } else if (g_.blocks == 1) {
        *reinterpret_cast<Quad*>(next + at) = value;
      } else {
        const int after = rank + i / (rows * quads),
                  peer = after < g_.blocks ? after : after - g_.blocks;   // first to itself
        if (asynchronous()) store_async(reinterpret_cast<Quad*>(next + at), value, barrier(steps_), peer);
        else *reinterpret_cast<Quad*>(cluster_map(next, peer) + at) = value;
      }
    }
  }

  __device__ __forceinline__ void arrive() {
    ++steps_;
    publish();
    warp_sync();   // a cluster's barrier wants whole warps
    if (asynchronous()) {
      if (thread_index() % 32 == 0) transactions_arrive(barrier(steps_ - 1), thread_index() == 0 ? g_.brought : 0);
      return;
    }
    if (g_.cluster > 1) return cluster_arrive();
    if (!through_l2()) return;
    block_sync();
    if (thread_index() == 0) flag_signal(flags() + rank, steps_);
  }

  __device__ __forceinline__ void wait() {
    warp_sync();
    if (asynchronous()) return transactions_wait(barrier(steps_ - 1), (steps_ - 1) / 2 % 2);
    if (g_.cluster > 1) return cluster_wait();
    if (through_l2()) {
      for (int r = thread_index(); r < g_.blocks; r += thread_count()) flag_wait(flags() + r, steps_);
      block_sync();
      const Quad* from = reinterpret_cast<const Quad*>(inbox(steps_ - 1));
      Quad* to = reinterpret_cast<Quad*>(shared_memory() + g_.state);
      for (int i = thread_index(); i < tile_bytes() / 16; i += thread_count())
        copy_async<16>(to + i, from + i);   // all on their way at once
      copy_commit();
      copy_wait<0>();
      publish();
    }
    block_sync();
  }

 private:
  const Geometry& g_;
  const Meeting& meeting_;
  unsigned steps_ = 0;

  __device__ __forceinline__ bool through_l2() const { return g_.blocks > 1 && g_.cluster == 1; }
  __device__ __forceinline__ bool asynchronous() const { return !grouped && clusters_exist && g_.brought; }
  __device__ __forceinline__ int tile_bytes() const { return g_.lanes * g_.pitch; }
  __device__ __forceinline__ uint64_t* barrier(unsigned step) const {
    return reinterpret_cast<uint64_t*>(shared_memory() + g_.barriers) + step % 2;
  }
  __device__ __forceinline__ char* inbox(unsigned step) const {
    return meeting_.inbox + (int64_t(index) * 2 + (step & 1)) * tile_bytes();
  }
  __device__ __forceinline__ unsigned* flags() const { return meeting_.flags + int64_t(index) * g_.blocks; }
};

}   // namespace stable_rnn
