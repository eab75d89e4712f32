// The router's launches. No torch here: pointers, sizes, a stream. Shapes as in library.cpp; everything is contiguous.
// "acc" is float, double where `dtype` (the logits') is f64.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "experts/experts.h"  // DType

namespace fastmoe_cpp::cuda {

enum class Score : int { softmax, sigmoid, sqrt_softplus };
enum class GroupRank : int { max, top2_sum };

inline constexpr int kMaxRouterExperts = 1024;

// A selected expert's weight: score, / (sum of the selected + epsilon) where renormalize, * scaling.
struct Weighting {
  Score score;
  bool after_topk;  // the K selected logits go through the score function by themselves
  bool renormalize;
  double epsilon, scaling;
};

// One launch: scores, selection, weights.
struct RouteParams {
  DType dtype;
  int64_t tokens;
  int experts, top_k;            // 1 <= K <= E <= kMaxRouterExperts
  const void* logits;            // [T, E]
  const void* expert_bias;       // [E] acc, or null
  const void* selection_scores;  // [T, E] acc, or null
  const int64_t* replay_ids;     // [T, K], or null: select
  Weighting weighting;
  int num_groups, topk_groups;
  GroupRank group_rank;
  void* topk_weights;  // [T, K] acc
  int64_t* topk_ids;   // [T, K]
  void* scores;        // [T, E] acc
};
cudaError_t route(const RouteParams&, cudaStream_t);

// Logits of a few tokens in float32: hidden_states @ weight.T + bias. A token's do not depend on the others'.
struct FewLogitsParams {
  DType hidden_type, weight_type;
  int64_t tokens, hidden;
  int experts;
  const void* hidden_states;  // [T, H]
  const void* weight;         // [E, H]
  const float* bias;          // [E], or null
  float* logits;              // [T, E]
};
inline constexpr int kMaxFewTokens = 8, kMaxFewPairs = 64;
// Whether logits_of_few takes it on the current device: at most kMaxFewTokens, both of one type below 64 bits or a float32
// weight, H a multiple of 8, rows on 16 bytes, compute capability 9.0 or newer.
cudaError_t takes_logits_of_few(const FewLogitsParams&, bool* taken);
cudaError_t logits_of_few(const FewLogitsParams&, cudaStream_t);

// One launch of one cluster of blocks: the logits of a few tokens, to the bit, then their choice, and the plan of a
// dispatch without capacity or padding (dispatch.h).
struct RouteFewParams {
  FewLogitsParams logits;
  RouteParams route;           // of those logits; selects by itself: no selection_scores, no replay_ids
  int32_t* slot_index;         // [T * K]
  int32_t* token_slot;         // [T, K]
  int32_t* expert_offsets;     // [E + 1]
  int64_t* tokens_per_expert;  // [E]
};
// Where logits_of_few takes the logits, and the pairs are at most kMaxFewPairs.
cudaError_t takes_route_few(const RouteFewParams&, bool* taken);
cudaError_t route_few(const RouteFewParams&, cudaStream_t);

struct RouteBackwardParams {
  DType dtype;
  int64_t tokens;
  int experts, top_k;
  const void* grad_topk_weights;  // [T, K] acc, or null
  const void* grad_scores;        // [T, E] acc, or null
  const void* logits;             // [T, E]
  const int64_t* topk_ids;        // [T, K]; an id may repeat, -1 gets nothing
  Weighting weighting;
  void* grad_logits;  // [T, E] in dtype
};
cudaError_t route_backward(const RouteBackwardParams&, cudaStream_t);

// One cooperative launch: d1[e] * exp(logits[t, e]) * d0[t] after alternate scalings of rows and columns.
struct SinkhornParams {
  DType dtype;
  int64_t tokens;
  int experts;
  const void* logits;  // [T, E]
  int iterations;      // 0: until the mean change of d1 is at most `tolerance`, kSinkhornLimit iterations at the most
  double tolerance;
  void* out;           // [T, E] acc
  void* row_scale;     // [T] acc, temporary
  void* column_scale;  // [2, E] acc, temporary
  void* partial;       // [sinkhorn_blocks, E] acc, temporary
};
inline constexpr int kSinkhornLimit = 1000;
cudaError_t sinkhorn_blocks(const SinkhornParams&, int64_t* blocks);
cudaError_t sinkhorn(const SinkhornParams&, cudaStream_t);

// A float as a sum of `parts` bfloat16 numbers, 8 bits of the mantissa each: bfloat16 matrix products of the parts have
// exact products, and the sum over parts is that of the float. [outer, inner] -> [outer, parts, inner].
struct SplitParams {
  int64_t outer, inner;
  int parts;
  const float* in;
  void* out;
};
cudaError_t split_bf16(const SplitParams&, cudaStream_t);

}  // namespace fastmoe_cpp::cuda
