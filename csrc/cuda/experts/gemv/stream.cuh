// The weights' side: every warp walks over its items, and copies of the rows they need run ahead of it into a ring.
#pragma once
#include "../portable/ptx.cuh"
#include "arguments.h"
#include "experts_with_slots.cuh"

namespace fastmoe_cpp::cuda::gemv {

inline constexpr int kLaneElements = 8, kStepElements = kWarp * kLaneElements;  // of k, in one step
inline constexpr int kMaxRows = 4;  // slots of an expert that take its weight together; more take it again

template <class T_, Kind kKind_>
struct Traits {
  using T = T_;
  static constexpr Kind kKind = kKind_;
  static constexpr bool kGated = kKind == Kind::gated_up, kUp = kGated || kKind == Kind::plain_up;
  static constexpr bool kCombined = kKind == Kind::combined_down;
  static constexpr Product kProduct = kUp ? Product::up : Product::down;
  static constexpr int kRows = rows_a_warp(kProduct);
  static constexpr int kSteps = kRingChunks / kRows;  // of the ring
  static_assert((kSteps & (kSteps - 1)) == 0 && kSteps >= 2);
};

// An item is a listed expert and a group of kRows of its weight's rows; the warps take items in turn, neighbours in
// different blocks, so that what a last round leaves over spreads over the multiprocessors. Where rows are combined,
// neighbours are the K experts of one group, in one block, whose warps go round together; where fewer are listed (a pair was
// dropped, or an expert has several) the same warps have nothing in every round.
template <class Traits>
struct Items {
  const ListedExpert* list;
  int listed, groups, total, top_k;

  __device__ Items(const Arguments& args, const ListedExpert* list, int listed)
      : list(list),
        listed(listed),
        groups(Traits::kGated ? args.columns : args.columns / Traits::kRows),
        total((Traits::kCombined ? args.top_k : listed) * groups),
        top_k(args.top_k) {}

  static __device__ __forceinline__ int first() {
    const int warp = threadIdx.x / kWarp;
    return Traits::kCombined ? blockIdx.x * kWarps + warp : blockIdx.x + warp * gridDim.x;
  }
  static __device__ __forceinline__ int step() { return gridDim.x * kWarps; }
  // Of the items that the block's warps take together, the first to be there if any is.
  static __device__ __forceinline__ int lowest(int item) {
    return Traits::kCombined ? item - static_cast<int>(threadIdx.x / kWarp) : item;
  }
  __device__ __forceinline__ ListedExpert find(int item, int& group) const {
    if constexpr (Traits::kCombined) {
      group = static_cast<unsigned>(item) / static_cast<unsigned>(top_k);
      const int place = item - group * top_k;
      if (item < total && place < listed) return list[place];
      group = 0;
      return {};
    }
    const unsigned place = static_cast<unsigned>(item) / static_cast<unsigned>(groups);
    group = item - static_cast<int>(place) * groups;
    return list[place];
  }
};

// Row 0 of an item in the weight [E * weight_rows, k], and what lies between its rows.
template <class Traits>
__device__ __forceinline__ int64_t first_weight_row(const Arguments& args, int expert, int group) {
  if constexpr (Traits::kGated) return int64_t{expert} * 2 * args.columns + (args.interleaved ? 2 * group : group);
  return int64_t{expert} * args.columns + group * Traits::kRows;
}
template <class Traits>
__device__ __forceinline__ int weight_row_step(const Arguments& args) {
  return Traits::kGated && !args.interleaved ? args.columns : 1;
}

// A step is kStepElements of k of an item's rows; an item has all its steps once for every kMaxRows slots of its expert.
// A lane copies and reads its own 16 bytes of each row alone, so the ring needs no barrier.
template <class Traits>
class WeightStream {
  using T = typename Traits::T;

 public:
  __device__ WeightStream(const Arguments& args, const Items<Traits>& items, portable::SharedAddress ring)
      : args_(args),
        items_(items),
        item_(Items<Traits>::first() - Items<Traits>::step()),
        ring_(ring + threadIdx.x * 16) {
    next_item();
  }

  // Copies the next step into the ring's next place, the one that was read longest ago; a group even past the last step.
  __device__ __forceinline__ void copy() {
    if (passes_ > 0) {
      const int mine = k_ + lane_id() * kLaneElements;
      const bool valid = mine < args_.k;
      const T* from = row_ + (valid ? mine : 0);
#pragma unroll
      for (int c = 0; c < Traits::kRows; ++c) {
        portable::copy_async<16>(place(next_, c), from, valid);
        from += static_cast<int64_t>(weight_row_step<Traits>(args_)) * args_.k;
      }
      k_ += kStepElements;
      if (k_ >= args_.k) {
        k_ = 0;
        if (--passes_ == 0) next_item();
      }
    }
    next_ = (next_ + 1) & (Traits::kSteps - 1);
    portable::copy_async_commit();
  }

  // Until the step that was copied kSteps - 1 calls ago is there.
  __device__ __forceinline__ void wait() const { portable::copy_async_wait<Traits::kSteps - 2>(); }

  // A row of the step that was copied kSteps calls ago: the next copy() overwrites it.
  __device__ __forceinline__ uint4 read(int row) const { return portable::load_shared<uint4>(place(next_, row)); }

 private:
  __device__ __forceinline__ portable::SharedAddress place(int step, int row) const {
    return ring_ + (step * Traits::kRows + row) * (kThreads * 16);
  }

  __device__ __forceinline__ void next_item() {
    item_ += Items<Traits>::step();
    if (item_ >= items_.total) return;
    int group;
    const ListedExpert e = items_.find(item_, group);
    passes_ = static_cast<unsigned>(e.slots + kMaxRows - 1) / kMaxRows;
    row_ = static_cast<const T*>(args_.weight) + first_weight_row<Traits>(args_, e.expert, group) * args_.k;
  }

  const Arguments& args_;
  const Items<Traits>& items_;
  int item_, passes_ = 0, k_ = 0;
  const T* row_ = nullptr;
  portable::SharedAddress ring_;
  int next_ = 0;
};

}  // namespace fastmoe_cpp::cuda::gemv
