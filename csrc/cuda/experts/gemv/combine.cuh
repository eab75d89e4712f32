// Rows that meet in their block: what is left of combine where a block has all slots of its columns.
#pragma once
#include "stream.cuh"

namespace fastmoe_cpp::cuda::gemv {

// The rows of a round in shared memory, kRows columns each, rounded as they would be in memory, and what the token makes of
// them: the sum over k, in order, of weights[k] * row of token_slot[k], in float32.
template <class Traits>
class TokenSum {
  using T = typename Traits::T;
  using Row = Vec<T, Traits::kRows>;

 public:
  struct Memory {
    Row rows[2][kWarps];  // by turns: one is written while the other is read
    int slot[kWarps];     // by k; -1: dropped
    float weight[kWarps];
  };

  __device__ TokenSum(const Arguments& args, Memory& memory) : args_(args), memory_(memory) {}

  // By all threads; add() may be called after the block's next barrier. Reads past L1, as list_experts does.
  __device__ __forceinline__ void fetch() {
    const int k = threadIdx.x;
    if (k >= args_.top_k) return;
    memory_.slot[k] = __ldcg(args_.token_slot + k);
    memory_.weight[k] = args_.scale == nullptr ? 1.0f : __ldcg(args_.scale + k);
  }

  // By the warp of an item.
  __device__ __forceinline__ void put(int slot, const Row& row) {
    const int warp = threadIdx.x / kWarp;
    memory_.rows[turn_][warp - warp % args_.top_k + slot] = row;
  }

  // By all threads, once a round, whose lowest item this is. A thread sums a group of columns.
  __device__ __forceinline__ void add(int lowest) {
    __syncthreads();
    const int first = threadIdx.x * args_.top_k, group = lowest / args_.top_k + threadIdx.x;
    const Row* const rows = memory_.rows[turn_] + first;
    turn_ ^= 1;
    if (first >= kWarps || group * Traits::kRows >= args_.columns) return;
    float sums[Traits::kRows] = {};
    for (int k = 0; k < args_.top_k; ++k) {
      if (memory_.slot[k] < 0) continue;
      const Row row = rows[memory_.slot[k]];
#pragma unroll
      for (int c = 0; c < Traits::kRows; ++c) sums[c] += memory_.weight[k] * to_acc(row.v[c]);
    }
    Row out;
#pragma unroll
    for (int c = 0; c < Traits::kRows; ++c) out.v[c] = from_acc<T>(sums[c]);
    static_cast<Row*>(args_.out)[group] = out;
  }

 private:
  const Arguments& args_;
  Memory& memory_;
  int turn_ = 0;
};

}  // namespace fastmoe_cpp::cuda::gemv
