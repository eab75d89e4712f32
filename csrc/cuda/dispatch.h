// The dispatch plan. No torch here: pointers, sizes, a stream. Shapes as in library.cpp; everything is contiguous.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastmoe_cpp::cuda {

// Ids to the plan: stable (slots of an expert are in order of the pair t * K + k) and the same in every run.
// One launch, cooperative (all blocks resident, one a multiprocessor) unless one block does; a second chooses the pairs
// that capacity keeps where that goes by weight.
struct DispatchParams {
  int64_t tokens;
  int top_k, experts;          // T * K < 2^31, E <= 1024
  const void* topk_ids;        // [T, K]; -1 is dropped
  bool wide_ids;               // int64, else int32
  const bool* padding_mask;    // [T], true is dropped before it is counted; or null
  int64_t capacity;            // pairs an expert keeps; negative: all
  bool by_weight;              // capacity keeps the largest weights (ties: the earlier pair; NaN is the smallest),
                               // else the first pairs
  const void* topk_weights;    // [T, K], read where by_weight
  bool wide_weights;           // double, else float
  int32_t* slot_index;         // [T * K]; -1 past expert_offsets[E]
  int32_t* token_slot;         // [T, K]
  int32_t* expert_offsets;     // [E + 1]
  int64_t* tokens_per_expert;  // [E], before capacity
  int32_t* block_counts;       // [dispatch_blocks, E], temporary; null where that is 1
  int32_t* pairs_by_expert;    // [T * K], temporary; read and written where by_weight
  int32_t* uncapped_offsets;   // [E + 1], likewise
};
cudaError_t dispatch_blocks(int64_t pairs, int64_t* blocks);
cudaError_t dispatch(const DispatchParams&, cudaStream_t);

}  // namespace fastmoe_cpp::cuda
