#include <ATen/ATen.h>
#include <torch/library.h>

#include "../ops/checks.h"

namespace fastmoe_cpp::meta {
namespace {

Tensor empty_like_if(bool wanted, c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  return wanted ? at::empty_symint(sizes, options) : at::empty({0}, options);
}

std::tuple<Tensor, Tensor> experts_forward(const Tensor& hidden_states, const Tensor& gate_up_proj,
                                           const Tensor& down_proj, const Tensor& topk_weights,
                                           const Tensor& slot_index, const Tensor& token_slot,
                                           const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                                           const OptionalTensor& down_bias, std::string_view activation, double, double,
                                           bool, bool, bool keep_pre_activation) {
  check_experts_forward(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                        gate_up_bias, down_bias, activation);
  return {at::empty_symint(hidden_states.sym_sizes(), hidden_states.options()),
          keep_pre_activation
              ? at::empty_symint({slot_index.sym_size(0), gate_up_proj.sym_size(1)}, hidden_states.options())
              : at::empty({0}, hidden_states.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
    std::string_view activation, double, double, bool, bool, std::array<bool, 6> output_mask) {
  check_experts_backward(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot,
                         expert_offsets, gate_up_bias, down_bias, pre_activation, activation);
  const auto options = hidden_states.options();
  const std::vector<c10::SymInt> up_bias{gate_up_proj.sym_size(0), gate_up_proj.sym_size(1)};
  const std::vector<c10::SymInt> down_bias_sizes{down_proj.sym_size(0), down_proj.sym_size(1)};
  return {empty_like_if(output_mask[0], hidden_states.sym_sizes(), options),
          empty_like_if(output_mask[1], gate_up_proj.sym_sizes(), options),
          empty_like_if(output_mask[2], down_proj.sym_sizes(), options),
          empty_like_if(output_mask[3], topk_weights.sym_sizes(), topk_weights.options()),
          empty_like_if(output_mask[4], up_bias, options),
          empty_like_if(output_mask[5], down_bias_sizes, options)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward_accumulate(
    const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
    std::string_view activation, double alpha, double limit, bool interleaved, bool weight_on_input,
    std::array<bool, 6> output_mask, const OptionalTensor& gate_up_main_grad, const OptionalTensor& down_main_grad,
    const OptionalTensor& workspace) {
  check_workspace(workspace, hidden_states, gate_up_proj, slot_index);
  check_main_grads(gate_up_proj, down_proj, gate_up_main_grad, down_main_grad);
  output_mask[1] = output_mask[1] && !has(gate_up_main_grad);
  output_mask[2] = output_mask[2] && !has(down_main_grad);
  return experts_backward(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot,
                          expert_offsets, gate_up_bias, down_bias, pre_activation, activation, alpha, limit,
                          interleaved, weight_on_input, output_mask);
}

Tensor grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                      const OptionalTensor& bias) {
  check_grouped_linear(rows, weight, expert_offsets, bias);
  return at::empty_symint({rows.sym_size(0), weight.sym_size(1)}, rows.options());
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(const Tensor& grad_output, const Tensor& rows,
                                                           const Tensor& weight, const Tensor& expert_offsets,
                                                           std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad_output, rows, weight, expert_offsets);
  const std::vector<c10::SymInt> bias{weight.sym_size(0), weight.sym_size(1)};
  return {empty_like_if(output_mask[0], rows.sym_sizes(), rows.options()),
          empty_like_if(output_mask[1], weight.sym_sizes(), rows.options()),
          empty_like_if(output_mask[2], bias, rows.options())};
}

}  // namespace
}  // namespace fastmoe_cpp::meta

TORCH_LIBRARY_IMPL(fastmoe_cpp, Meta, m) {
  using namespace fastmoe_cpp::meta;
  m.impl("experts_forward", experts_forward);
  m.impl("experts_backward", experts_backward);
  m.impl("experts_backward_accumulate", experts_backward_accumulate);
  m.impl("grouped_linear", grouped_linear);
  m.impl("grouped_linear_backward", grouped_linear_backward);
}
