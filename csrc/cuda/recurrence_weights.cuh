// What precedes a recurrence, in one launch: W_hh is packed into the order in which warps read it (the product's fragments), the place
// where blocks meet is zeroed, and rows of the batch without any time hand their states through.
//
// W_hh has G H^2 elements, read once and written once: at H = 1024 in 16 bits 17 MB, 4 us at 4 TB/s. Not yet measured.
#pragma once
#include "recurrence_layout.h"
#include "recurrence_product.cuh"
#include "tile.cuh"

namespace stable_rnn {

struct PrepareParams {
  Geometry geometry;
  WarpLayout layout;
  Lanes lanes;
  int64_t hidden;
  const void* w_hh;   // [G*H, H]
  Quad* packed;       // [blocks][slots][layout.blocks][chunks][2][fragments], see below
  int64_t quads;
  Quad* meeting;   // zeroed
  int64_t meeting_quads;
  int64_t empty_rows;            // B where there may be rows of length 0, else 0
  const void *h_from, *c_from;   // [B, H] or null: zeros
  void *h_to, *c_to;             // [B, H] or null
};

// The slots of a block are the warps of its groups (see WarpLayout), which all have their own weights.
template <int dtype>
__device__ __forceinline__ Quad pack(const PrepareParams& q, int64_t index) {
  using A = Arithmetic<dtype>;
  constexpr int of_word = 4 / A::shape.element, of_chunk = A::shape.chunk / A::shape.element;   // elements
  const Geometry& g = q.geometry;
  const WarpLayout at = q.layout;
  const int fragment = index % A::shape.fragments, j = (index /= A::shape.fragments) % 2,
            chunk = (index /= 2) % g.chunks;
  const int block = (index /= g.chunks) % at.blocks, slot = (index /= at.blocks) % (g.groups * at.warps);
  const int first_unit = index / (g.groups * at.warps) * g.units + slot / at.warps * at.units;
  const int chunks = g.segment / A::shape.chunk, first_k = chunk % chunks * of_chunk;   // of one gate
  const int first_gate = at.backward ? slot % at.warps * at.own_gates + chunk / chunks : block * (16 / at.units);

  const int64_t H = q.hidden;
  const auto* w = static_cast<const typename A::Storage*>(q.w_hh);
  Quad quad;
  for (int word = 0; word < 4; ++word) {
    int word_of = A::word_of(j, fragment, word);
    if constexpr (A::shape.element == 2)
      if (g.product == by_wgmma) word_of = GroupProduct<A>::word_of(j, fragment, word);
    const int row = A::row_of(j, fragment, word), k = first_k + word_of * of_word;
    const bool second = row >= at.units;   // gate of the block
    const int unit = first_unit + (second ? row - at.units : row), gate = first_gate + second;
    typename A::Element elements[of_word];
    for (int e = 0; e < of_word; ++e) {
      float value = 0;
      if (unit < H && k + e < H)
        value = at.backward ? w[(gate * H + k + e) * H + unit] : w[(gate * H + unit) * H + k + e];
      elements[e] = A::element(value);
    }
    std::memcpy(&quad.word[word], elements, 4);
  }
  return quad;
}

template <class Storage>
__device__ __forceinline__ void hand_through(const void* from, void* to, int64_t i) {
  if (to) static_cast<Storage*>(to)[i] = from ? static_cast<const Storage*>(from)[i] : Storage(0.f);
}

template <int dtype>
__global__ void __launch_bounds__(256) prepare(const PrepareParams q) {
  using Storage = typename Arithmetic<dtype>::Storage;
  const int64_t first = int64_t(block_index()) * thread_count() + thread_index(),
                step = int64_t(block_count()) * thread_count();
  for (int64_t i = first; i < q.quads; i += step) q.packed[i] = pack<dtype>(q, i);
  for (int64_t i = first; i < q.meeting_quads; i += step) q.meeting[i] = Quad{};
  for (int64_t i = first; i < q.empty_rows * q.hidden; i += step) {
    if (length_of(q.lanes, i / q.hidden) > 0) continue;
    hand_through<Storage>(q.h_from, q.h_to, i);
    hand_through<Storage>(q.c_from, q.c_to, i);
  }
}

// A block's weights where they stay during the launch, and this warp's of them.
template <class A, int rows>
class BlockWeights {
 public:
  __device__ __forceinline__ BlockWeights(const Geometry& g, const Quad* const& all, int rank, int slot)
      : g_(g), all_(all), rank_(rank),
        offset_(slot * (rows * g.chunks * 2 * A::shape.fragments) + A::fragment(thread_index() % 32)) {
    if (g.place != in_shared) return;
    Quad* here = reinterpret_cast<Quad*>(shared_memory());
    for (int i = thread_index(); i < g.weights / 16; i += thread_count()) copy_async<16>(here + i, block() + i);
    copy_commit();
    copy_wait<0>();   // seen by all after the next barrier
  }
  // This thread's first Quad.
  __device__ __forceinline__ const Quad* shared() const {
    return reinterpret_cast<const Quad*>(shared_memory()) + offset_;
  }
  __device__ __forceinline__ const Quad* global() const { return block() + offset_; }

 private:
  const Geometry& g_;
  const Quad* const& all_;
  const int rank_, offset_;
  __device__ __forceinline__ const Quad* block() const { return all_ + rank_ * (g_.weights / 16); }
};

}   // namespace stable_rnn
