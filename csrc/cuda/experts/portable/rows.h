// The passes over rows beside the products. Element types and shapes as in experts.h.
#pragma once
#include "arguments.h"

namespace fastmoe_cpp::cuda::portable {

// grad[e, c] = sum over the slots s of expert e of w(s) * left[row(s), c], row(s) = token(s) where gathered, else s;
// zeros for an expert with no slot. weights null: all ones.
struct ColumnSums {
  DType dtype;
  const int32_t *expert_offsets, *slot_index;
  int experts, columns, top_k;
  int alternate;  // I where the bias' 2I gate and up entries alternate, else 0
  bool gather;
  const void *left, *weights;
  void* grad;  // [E, columns]
};
cudaError_t column_sums(const ColumnSums&, cudaStream_t);

// grad_weight[s] = sum over b, in order, of partial[b, s], + <grad_output[token(s)], bias[e]> where there is a bias.
struct SlotDots {
  DType dtype;
  const int32_t *expert_offsets, *slot_index;
  int experts, top_k, hidden, blocks;
  int64_t slots;
  const void *partial, *grad_output, *bias;  // [blocks, P], [T, H], [E, H] or null
  void* grad_weight;                         // [P]
};
cudaError_t slot_dots(const SlotDots&, cudaStream_t);

// Zeros in the rows from expert_offsets[experts] to `slots`.
cudaError_t zero_tail(DType, void* rows, const int32_t* expert_offsets, int experts, int64_t slots, int64_t columns,
                      cudaStream_t);

}  // namespace fastmoe_cpp::cuda::portable
