// What a layer is built from. Names, defaults and meanings are those of Python's MoEConfig and RouterConfig.
#pragma once
#include <c10/core/ScalarType.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <string>

namespace fastmoe_cpp {

// How tokens choose experts. The defaults are Mixtral's: float32 softmax, top-k, renormalised, no bias.
struct RouterOptions {
  // "softmax" over the experts, or elementwise "sigmoid" or "sqrtsoftplus".
  TORCH_ARG(std::string, score_function) = "softmax";
  // Choose by the logits and apply the score function to the K chosen ones alone (gpt-oss).
  TORCH_ARG(bool, scores_after_topk) = false;
  // Divide the K weights by (their sum + renormalize_epsilon).
  TORCH_ARG(bool, renormalize) = true;
  TORCH_ARG(double, renormalize_epsilon) = 0.0;
  // Multiplies the weights, after renormalisation.
  TORCH_ARG(double, scaling_factor) = 1.0;
  // Group-limited routing: of num_groups groups of experts only the best topk_groups are chosen from; a group is worth
  // its best score ("max") or the sum of its two best ("top2_sum").
  TORCH_ARG(int64_t, num_groups) = 1;
  TORCH_ARG(int64_t, topk_groups) = 1;
  TORCH_ARG(std::string, group_score) = "max";
  // A linear bias of the logits, trained like a weight.
  TORCH_ARG(bool, bias) = false;
  // A bias of the selection alone, moved against the load by MoE::update_expert_bias (arXiv 2408.15664).
  TORCH_ARG(bool, expert_bias) = false;
  TORCH_ARG(double, expert_bias_update_rate) = 1e-3;
  TORCH_ARG(bool, expert_bias_zero_mean) = false;
  // In training, choose by Sinkhorn's assignment; 0 iterations run to the tolerance.
  TORCH_ARG(bool, sinkhorn) = false;
  TORCH_ARG(int64_t, sinkhorn_iterations) = 0;
  TORCH_ARG(double, sinkhorn_tolerance) = 1e-4;
  // In training, multiply the router's input (with jitter_experts the experts' too) by U[1 - jitter_eps, 1 + jitter_eps].
  TORCH_ARG(double, jitter_eps) = 0.0;
  TORCH_ARG(bool, jitter_experts) = false;
  // What the logits are rounded to; they are computed in float32 or wider.
  TORCH_ARG(c10::ScalarType, dtype) = c10::kFloat;
  // Of the losses that training adds; 0 trains without. The balance loss is Python's 'batch' form (Megatron-LM's):
  // E * sum over experts of (share of the T * K choices) * (mean probability).
  TORCH_ARG(double, balance_loss_coefficient) = 0.0;
  TORCH_ARG(double, z_loss_coefficient) = 0.0;
};

// One Mixture-of-Experts layer. Sizes count features and experts.
struct MoEOptions {
  MoEOptions(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts)
      : hidden_size_(hidden_size), intermediate_size_(intermediate_size), num_experts_(num_experts) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, intermediate_size);
  TORCH_ARG(int64_t, num_experts);
  TORCH_ARG(int64_t, top_k) = 2;
  TORCH_ARG(RouterOptions, router);

  // Gated "swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu", or ungated "silu", "gelu", "gelu_tanh", "relu",
  // "relu2".
  TORCH_ARG(std::string, activation) = "swiglu";
  // Of "clamped_swiglu" alone.
  TORCH_ARG(double, activation_alpha) = 1.702;
  TORCH_ARG(double, activation_limit) = 7.0;
  // Biases of the experts' two projections (not of the shared experts).
  TORCH_ARG(bool, bias) = false;
  // gate_up_proj alternates gate and up rows instead of holding gate rows, then up rows.
  TORCH_ARG(bool, interleaved) = false;
  // Apply the routing weight to the expert's input instead of its output.
  TORCH_ARG(bool, weight_on_input) = false;

  // Width of the experts every token visits, all of them as one MLP.
  TORCH_ARG(std::optional<int64_t>, shared_intermediate_size);
  // Scale the shared experts' output by sigmoid(x @ gate.T).
  TORCH_ARG(bool, shared_expert_gate) = false;

  // An expert takes at most ceil(factor * T * top_k / num_experts) tokens of a batch of T; nullopt is unlimited and 0
  // drops everything. It keeps the first ("position") or those of largest weight ("probs").
  TORCH_ARG(std::optional<double>, capacity_factor);
  TORCH_ARG(std::optional<double>, eval_capacity_factor);
  TORCH_ARG(std::string, drop_policy) = "position";

  // Keep only the input for backward and compute the pre-activation again.
  TORCH_ARG(bool, recompute) = false;
  // Standard deviation of the normal distribution the weights start from; biases start at 0.
  TORCH_ARG(double, initializer_range) = 0.02;

 public:
  // Whether the activation takes a gate and an up half.
  bool gated() const;
  // Rows of gate_up_proj: 2 * intermediate_size for gated activations, intermediate_size otherwise.
  int64_t gate_up_size() const { return intermediate_size_ * (gated() ? 2 : 1); }
  // The most tokens one expert takes of a batch of that many, or nullopt where unlimited.
  std::optional<int64_t> capacity(int64_t tokens, bool training) const;
  // Throws c10::ValueError, one sentence with the field, what is allowed and the value.
  void check() const;
};

}  // namespace fastmoe_cpp
