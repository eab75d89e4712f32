// Sums of slots' rows into tokens, and the way back. No torch here: pointers, sizes, a stream.
// Shapes as in library.cpp: T tokens, H hidden size, K experts a token, P slots. Rows are contiguous, of `dtype`;
// routing weights are float, double where dtype is f64. Every sum is in float32 (float64 for f64), in a fixed order.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "experts/experts.h"  // DType

namespace fastmoe_cpp::cuda {

// out[t] = sum over k, in order, of weights[t, k] * rows[token_slot[t, k]]; a slot of -1 is skipped and never read.
struct CombineParams {
  DType dtype;
  int64_t tokens, hidden;
  int top_k;
  const int32_t* token_slot;  // [T, K]
  const void* weights;        // [T, K], or null: all ones
  const void* rows;           // [P, H]
  void* out;                  // [T, H]
};
cudaError_t combine(const CombineParams&, cudaStream_t);

// grad_rows[token_slot[t, k]] = weights[t, k] * grad_output[t], and zeros in the rows that no pair owns;
// grad_weights[t, k] = <grad_output[t], rows[token_slot[t, k]]>, and 0 where the slot is -1.
// With grad_output = hidden states and no weights, grad_rows is the gather of the dispatch. With grad_output = hidden
// states and rows = the up projection's grad_rows, grad_weights is the routing weights' gradient under weight_on_input.
struct CombineBackwardParams {
  DType dtype;
  int64_t tokens, hidden;
  int top_k, experts;
  int64_t slots;                  // P
  const int32_t* token_slot;      // [T, K]
  const int32_t* expert_offsets;  // [E + 1]; read for grad_rows only
  const void* weights;            // [T, K], or null: all ones; read for grad_rows only
  const void* grad_output;        // [T, H]
  const void* rows;               // [P, H]; read for grad_weights only
  void* grad_rows;                // [P, H], or null where not wanted
  void* grad_weights;             // [T, K], or null where not wanted
};
cudaError_t combine_backward(const CombineBackwardParams&, cudaStream_t);

// by_pair[t, k] = by_slot[token_slot[t, k]], and 0 where that is -1. Values are float, double where dtype is f64.
struct SlotsToPairsParams {
  DType dtype;
  int64_t pairs;              // T * K
  const int32_t* token_slot;  // [T, K]
  const void* by_slot;        // [P]
  void* by_pair;              // [T, K]
};
cudaError_t slots_to_pairs(const SlotsToPairsParams&, cudaStream_t);

}  // namespace fastmoe_cpp::cuda
