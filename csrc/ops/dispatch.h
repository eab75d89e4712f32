// Dispatch: ids -> the plan. No data is copied except by gather.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fastmoe_cpp {

// topk_ids [T, K] -> (slot_index [T*K], token_slot [T, K], expert_offsets [E + 1], all int32; tokens_per_expert [E] int64).
// Expert e owns slots expert_offsets[e] .. expert_offsets[e + 1], in order of the pair index t*K + k that slot_index
// holds; token_slot is the inverse, -1 where a pair is dropped: by an id of -1, by padding_mask [T] (True = padding) or
// by capacity, which keeps the first (drop_policy "position") or the heaviest ("probs") pairs of an expert.
// tokens_per_expert counts the pairs that asked for an expert before capacity dropped any.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dispatch(
    const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& topk_weights = std::nullopt,
    std::optional<c10::SymInt> capacity = std::nullopt, std::string_view drop_policy = "position",
    const std::optional<at::Tensor>& padding_mask = std::nullopt);

// hidden_states [T, H] -> rows [P, H] in expert order; rows past expert_offsets[E] are zero. P is slot_index's size: all
// T*K of dispatch, or fewer where the caller knows that expert_offsets[E] is at most P and cuts the rest off.
at::Tensor gather(const at::Tensor& hidden_states, const at::Tensor& slot_index, const at::Tensor& token_slot,
                  const at::Tensor& expert_offsets);
at::Tensor gather_backward(const at::Tensor& grad_rows, const at::Tensor& token_slot);

// (logits, topk_weights, topk_ids, scores) as router_logits and route return them, then (slot_index, token_slot,
// expert_offsets, tokens_per_expert) as dispatch does without capacity or padding.
using RoutedTokens =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The three operators in one, with their gradients; of a few tokens without gradients one launch on a GPU.
RoutedTokens route_and_dispatch(const at::Tensor& hidden_states, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, int64_t top_k,
                                const std::optional<at::Tensor>& expert_bias = std::nullopt,
                                std::string_view score_function = "softmax", bool scores_after_topk = false,
                                bool renormalize = true, double renormalize_epsilon = 0.0, double scaling_factor = 1.0,
                                int64_t num_groups = 1, int64_t topk_groups = 1, std::string_view group_score = "max");

// The same by calling the three.
RoutedTokens route_then_dispatch(const at::Tensor& hidden_states, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias, int64_t top_k,
                                 const std::optional<at::Tensor>& expert_bias, std::string_view score_function,
                                 bool scores_after_topk, bool renormalize, double renormalize_epsilon,
                                 double scaling_factor, int64_t num_groups, int64_t topk_groups,
                                 std::string_view group_score);

}  // namespace fastmoe_cpp
