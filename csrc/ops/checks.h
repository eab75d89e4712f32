// The boundary: every operator's arguments are checked once, by the function of its name, before any kernel runs.
// The checks read symbolic sizes, so the CPU, CUDA and Meta kernels share them. A failure is one sentence that names
// the argument, what was expected and what was found.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>

#include "../activation.h"

namespace fastmoe_cpp {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

enum class ScoreFunction { Softmax, Sigmoid, SqrtSoftplus };
enum class GroupScore { Max, Top2Sum };
enum class DropPolicy { Position, Probs };

inline constexpr int64_t kMaxExperts = 1024;

Activation parse_activation(std::string_view name);
ScoreFunction parse_score_function(std::string_view name);
GroupScore parse_group_score(std::string_view name);
DropPolicy parse_drop_policy(std::string_view name);

// float32 for the 16-bit types and float32, float64 for float64: what sums, scores and routing weights are kept in.
at::ScalarType accumulate_type(at::ScalarType type);

inline bool has(const OptionalTensor& t) { return t.has_value() && t->defined(); }

void check_router_logits(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias);
void check_router_logits_backward(const Tensor& grad_logits, const Tensor& hidden_states, const Tensor& weight);
void check_route(const Tensor& logits, int64_t top_k, const OptionalTensor& expert_bias,
                 const OptionalTensor& selection_scores, const OptionalTensor& topk_ids,
                 std::string_view score_function, double renormalize_epsilon, double scaling_factor, int64_t num_groups,
                 int64_t topk_groups, std::string_view group_score);
void check_route_backward(const OptionalTensor& grad_topk_weights, const OptionalTensor& grad_scores,
                          const Tensor& logits, const Tensor& topk_ids, std::string_view score_function);
void check_sinkhorn(const Tensor& logits, int64_t iterations, double tolerance);

void check_dispatch(const Tensor& topk_ids, int64_t num_experts, const OptionalTensor& topk_weights,
                    const std::optional<c10::SymInt>& capacity, std::string_view drop_policy,
                    const OptionalTensor& padding_mask);
void check_gather(const Tensor& hidden_states, const Tensor& slot_index, const Tensor& token_slot,
                  const Tensor& expert_offsets);
void check_gather_backward(const Tensor& grad_rows, const Tensor& token_slot);

void check_experts_forward(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
                           const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot,
                           const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                           const OptionalTensor& down_bias, std::string_view activation);
void check_experts_backward(const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj,
                            const Tensor& down_proj, const Tensor& topk_weights, const Tensor& slot_index,
                            const Tensor& token_slot, const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                            const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
                            std::string_view activation);
// After check_experts_backward.
void check_main_grads(const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_main_grad,
                      const OptionalTensor& down_main_grad);
void check_workspace(const OptionalTensor& workspace, const Tensor& hidden_states, const Tensor& gate_up_proj,
                     const Tensor& slot_index);
void check_grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                          const OptionalTensor& bias);
void check_grouped_linear_backward(const Tensor& grad_output, const Tensor& rows, const Tensor& weight,
                                   const Tensor& expert_offsets);

void check_combine(const Tensor& rows, const OptionalTensor& topk_weights, const Tensor& slot_index,
                   const Tensor& token_slot, const Tensor& expert_offsets);
void check_combine_backward(const Tensor& grad_output, const Tensor& rows, const OptionalTensor& topk_weights,
                            const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets);

void check_expert_counts(const Tensor& topk_ids, int64_t num_experts, const OptionalTensor& padding_mask);
void check_balance_loss(const Tensor& scores, const Tensor& tokens_per_expert, const OptionalTensor& padding_mask);
void check_balance_loss_backward(const Tensor& grad_loss, const Tensor& scores, const Tensor& tokens_per_expert,
                                 const OptionalTensor& padding_mask);
void check_z_loss(const Tensor& logits, const OptionalTensor& padding_mask);
void check_z_loss_backward(const Tensor& grad_loss, const Tensor& logits, const OptionalTensor& padding_mask);
void check_update_expert_bias(const Tensor& expert_bias, const Tensor& tokens_per_expert);

}  // namespace fastmoe_cpp
