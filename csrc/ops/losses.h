// Losses beside the router.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace fastmoe_cpp {

// topk_ids [S, L, K] -> pairs an expert was asked for in each sequence [S, E] int64; -1 and padding are not counted.
at::Tensor expert_counts(const at::Tensor& topk_ids, int64_t num_experts,
                         const std::optional<at::Tensor>& padding_mask = std::nullopt);

// scale * sum over s, e of tokens_per_expert[s, e] * (sum over the unpadded l of scores[s, l, e]): scores [S, L, E].
// The gradient goes to the scores alone. The published forms differ in `scale` only; see fastmoe_cpp.losses.
at::Tensor balance_loss(const at::Tensor& scores, const at::Tensor& tokens_per_expert, double scale,
                        const std::optional<at::Tensor>& padding_mask = std::nullopt);
at::Tensor balance_loss_backward(const at::Tensor& grad_loss, const at::Tensor& scores,
                                 const at::Tensor& tokens_per_expert, double scale,
                                 const std::optional<at::Tensor>& padding_mask);

// scale * mean over the unpadded tokens of logsumexp(logits[t])^2 (ST-MoE, arXiv 2202.08906, equation 5).
at::Tensor z_loss(const at::Tensor& logits, double scale = 1.0,
                  const std::optional<at::Tensor>& padding_mask = std::nullopt);
at::Tensor z_loss_backward(const at::Tensor& grad_loss, const at::Tensor& logits, double scale,
                           const std::optional<at::Tensor>& padding_mask);

// expert_bias += rate * sign(mean(tokens_per_expert) - tokens_per_expert), in place; less its mean where zero_mean
// (loss-free balancing, arXiv 2408.15664).
void update_expert_bias(const at::Tensor& expert_bias, const at::Tensor& tokens_per_expert, double rate,
                        bool zero_mean = false);

}  // namespace fastmoe_cpp
