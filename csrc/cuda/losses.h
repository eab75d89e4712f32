// Losses beside the router. No torch here: pointers, sizes, a stream. Shapes as in library.cpp, all contiguous.
// "acc" is float, double where `dtype` is f64. Sums are taken in a fixed order.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "experts/experts.h"  // DType

namespace fastmoe_cpp::cuda {

struct ExpertCountsParams {
  int64_t sequences, length;  // S, L
  int top_k, experts;
  const void* topk_ids;      // [S, L, K]; -1 is not counted
  bool wide_ids;             // int64, else int32
  const bool* padding_mask;  // [S, L], true is not counted; or null
  int64_t* counts;           // [S, E], zero before the launch
};
cudaError_t expert_counts(const ExpertCountsParams&, cudaStream_t);

// loss = scale * sum over s, e of counts[s, e] * (sum over the unpadded l of scores[s, l, e])
enum class CountType : int { i64, f32, f64 };
struct BalanceLossParams {
  DType dtype;
  int64_t sequences, length, experts;
  const void* scores;  // [S, L, E]
  const void* counts;  // [S, E]
  CountType count_type;
  double scale;
  const bool* padding_mask;  // [S, L] or null
  double* partial;           // [loss_blocks(S * L)], temporary
  void* loss;                // one acc
};
cudaError_t balance_loss(const BalanceLossParams&, cudaStream_t);

struct BalanceLossBackwardParams {
  DType dtype;
  int64_t sequences, length, experts;
  const void* grad_loss;  // one acc
  const void* counts;     // [S, E]
  CountType count_type;
  double scale;
  const bool* padding_mask;  // [S, L] or null
  void* grad_scores;         // [S, L, E] in dtype
};
cudaError_t balance_loss_backward(const BalanceLossBackwardParams&, cudaStream_t);

// loss = scale * mean over the unpadded t of logsumexp(logits[t])^2; 0 where every t is padding
struct ZLossParams {
  DType dtype;
  int64_t tokens, experts;
  const void* logits;  // [T, E]
  double scale;
  const bool* padding_mask;  // [T] or null
  double* partial;           // [2 * loss_blocks(T)], temporary
  void* loss;                // one acc
};
cudaError_t z_loss(const ZLossParams&, cudaStream_t);

struct ZLossBackwardParams {
  DType dtype;
  int64_t tokens, experts;
  const void* grad_loss;  // one acc
  const void* logits;     // [T, E]
  double scale;
  const bool* padding_mask;  // [T] or null
  double* partial;           // [loss_blocks(T)], temporary; null where there is no mask
  void* grad_logits;         // [T, E] in dtype
};
cudaError_t z_loss_backward(const ZLossBackwardParams&, cudaStream_t);

int64_t loss_blocks(int64_t rows);

// bias += rate * sign(mean(counts) - counts), that step less its mean where zero_mean
struct UpdateExpertBiasParams {
  bool wide_bias;  // double, else float
  int64_t experts;
  void* bias;          // [E]
  const void* counts;  // [E]
  CountType count_type;
  double rate;
  bool zero_mean;
};
cudaError_t update_expert_bias(const UpdateExpertBiasParams&, cudaStream_t);

}  // namespace fastmoe_cpp::cuda
