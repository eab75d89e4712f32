// Experts: the grouped MLP over the plan.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace fastmoe_cpp {

// out[t] = sum_k w[t, k] * MLP_e(hidden_states[t]) over the pairs the plan keeps: [T, H] -> [T, H].
// gate_up_proj [E, 2I, H] (gate rows then up rows, or alternating where `interleaved`; [E, I, H] for an ungated
// activation), down_proj [E, H, I], gate_up_bias [E, 2I], down_bias [E, H]. topk_weights [T, K] of any floating type.
// Backward keeps hidden_states, the pre-activation [T*K, 2I] and the plan; `recompute` drops the pre-activation too.
at::Tensor experts(const at::Tensor& hidden_states, const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
                   const at::Tensor& topk_weights, const at::Tensor& slot_index, const at::Tensor& token_slot,
                   const at::Tensor& expert_offsets, const std::optional<at::Tensor>& gate_up_bias = std::nullopt,
                   const std::optional<at::Tensor>& down_bias = std::nullopt, std::string_view activation = "swiglu",
                   double activation_alpha = 1.702, double activation_limit = 7.0, bool interleaved = false,
                   bool weight_on_input = false, bool recompute = false);
std::tuple<at::Tensor, at::Tensor> experts_forward(
    const at::Tensor& hidden_states, const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const at::Tensor& topk_weights, const at::Tensor& slot_index, const at::Tensor& token_slot,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, std::string_view activation, double activation_alpha,
    double activation_limit, bool interleaved, bool weight_on_input, bool keep_pre_activation);
// Gradients of (hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias); empty where not asked.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> experts_backward(
    const at::Tensor& grad_output, const at::Tensor& hidden_states, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const at::Tensor& topk_weights, const at::Tensor& slot_index,
    const at::Tensor& token_slot, const at::Tensor& expert_offsets, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, const std::optional<at::Tensor>& pre_activation,
    std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
    bool weight_on_input, std::array<bool, 6> output_mask);

// The same, but where a weight has a main_grad (of its shape, float32, or float64 for float64 weights) its gradient is
// added to that and returned empty; and workspace [P, 2I], which may be pre_activation, is memory to work in: what it
// holds is lost.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> experts_backward_accumulate(
    const at::Tensor& grad_output, const at::Tensor& hidden_states, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const at::Tensor& topk_weights, const at::Tensor& slot_index,
    const at::Tensor& token_slot, const at::Tensor& expert_offsets, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, const std::optional<at::Tensor>& pre_activation,
    std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
    bool weight_on_input, std::array<bool, 6> output_mask, const std::optional<at::Tensor>& gate_up_main_grad,
    const std::optional<at::Tensor>& down_main_grad, const std::optional<at::Tensor>& workspace = std::nullopt);

// out[s] = rows[s] @ weight[e].T (+ bias[e]) for the slots s of expert e: [S, in], [E, out, in] -> [S, out]. Rows past
// expert_offsets[E] are zero.
at::Tensor grouped_linear(const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& expert_offsets,
                          const std::optional<at::Tensor>& bias = std::nullopt);
std::tuple<at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(const at::Tensor& grad_output,
                                                                       const at::Tensor& rows, const at::Tensor& weight,
                                                                       const at::Tensor& expert_offsets,
                                                                       std::array<bool, 3> output_mask);

}  // namespace fastmoe_cpp
