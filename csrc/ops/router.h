// Router: hidden states -> logits -> K weights and K expert ids a token. Typed calls through the dispatcher, so that
// autograd, autocast, tracing and the device's kernel all apply.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace fastmoe_cpp {

// [T, H] @ [E, H].T (+ [E]) -> [T, E] in float32 (float64 if either operand is), whatever the operands' types.
at::Tensor router_logits(const at::Tensor& hidden_states, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias = std::nullopt);
std::tuple<at::Tensor, at::Tensor, at::Tensor> router_logits_backward(const at::Tensor& grad_logits,
                                                                      const at::Tensor& hidden_states,
                                                                      const at::Tensor& weight,
                                                                      std::array<bool, 3> output_mask);

// logits [T, E] -> (topk_weights [T, K] float32, topk_ids [T, K] int64, scores [T, E] float32); float64 for float64.
// K distinct ids a token in falling order of the selection key; ties go to the lower id, NaN ranks last.
// expert_bias [E] and selection_scores [T, E] decide who is selected and never reach a weight; a given topk_ids [T, K]
// replaces the selection (replay; -1 is a dropped pair).
std::tuple<at::Tensor, at::Tensor, at::Tensor> route(
    const at::Tensor& logits, int64_t top_k, const std::optional<at::Tensor>& expert_bias = std::nullopt,
    const std::optional<at::Tensor>& selection_scores = std::nullopt,
    const std::optional<at::Tensor>& topk_ids = std::nullopt, std::string_view score_function = "softmax",
    bool scores_after_topk = false, bool renormalize = true, double renormalize_epsilon = 0.0,
    double scaling_factor = 1.0, int64_t num_groups = 1, int64_t topk_groups = 1, std::string_view group_score = "max");
at::Tensor route_backward(const std::optional<at::Tensor>& grad_topk_weights,
                          const std::optional<at::Tensor>& grad_scores, const at::Tensor& logits,
                          const at::Tensor& topk_ids, std::string_view score_function, bool scores_after_topk,
                          bool renormalize, double renormalize_epsilon, double scaling_factor);

// Sinkhorn-normalised exp(logits) [T, E] float32, for selection only: no gradient. iterations = 0 runs to `tolerance`.
at::Tensor sinkhorn(const at::Tensor& logits, int64_t iterations = 0, double tolerance = 1e-4);

}  // namespace fastmoe_cpp
