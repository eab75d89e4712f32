#include "experts.h"

#include "checking.h"
#include "typed_call.h"

namespace fastmoe_cpp {
using namespace checking;

namespace {

void bias_matches(const OptionalTensor& bias, const char* name, const Arg& weight, const char* contract) {
  if (!has(bias)) return;
  const Arg b{*bias, name};
  dims(b, 2, contract);
  for (int64_t d = 0; d < 2; ++d) size_is(b, d, weight.size(d), contract);
  dtype_is(b, weight.t.scalar_type(), weight.name);
  same_device(b, weight);
}

void number_of_experts(const Arg& offsets, const Arg& weight) {
  size_is(offsets, 0, weight.size(0) + 1, "[E + 1] for as many experts as the weights hold");
  at_least(weight.size(0), 1, "the number of experts");
  if (auto e = weight.size(0).maybe_as_int())
    TORCH_CHECK_VALUE(*e <= kMaxExperts, "the number of experts must be at most ", kMaxExperts, ", got ", *e);
}

}  // namespace

void check_experts_forward(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
                           const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot,
                           const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                           const OptionalTensor& down_bias, std::string_view activation) {
  const Arg x{hidden_states, "hidden_states"}, up{gate_up_proj, "gate_up_proj"}, down{down_proj, "down_proj"},
      w{topk_weights, "topk_weights"}, slots{token_slot, "token_slot"};
  const bool gated = is_gated(parse_activation(activation));
  const char* up_shape = gated ? "[E, 2 * I, H]" : "[E, I, H]";
  dims(x, 2, "[T, H]");
  dims(up, 3, up_shape);
  dims(down, 3, "[E, H, I]");
  floating(x);
  size_is(up, 2, x.size(1), gated ? "[E, 2 * I, H] for hidden_states [T, H]" : "[E, I, H] for hidden_states [T, H]");
  size_is(down, 0, up.size(0), "[E, H, I] for as many experts as gate_up_proj");
  size_is(down, 1, x.size(1), "[E, H, I] for hidden_states [T, H]");
  size_is(up, 1, gated ? down.size(2) * 2 : down.size(2),
          gated ? "[E, 2 * I, H] for down_proj [E, H, I]" : "[E, I, H] for down_proj [E, H, I]");
  at_least(x.size(1), 1, "the hidden size");
  at_least(down.size(2), 1, "the intermediate size");
  for (const Arg* a : {&up, &down}) {
    TORCH_CHECK_TYPE(a->t.scalar_type() == x.t.scalar_type(), a->name, " must have the dtype of hidden_states, ",
                     x.t.scalar_type(), ", outside autocast, got ", a->t.scalar_type());
    same_device(*a, x);
  }
  bias_matches(gate_up_bias, "gate_up_bias", up, "[E, 2 * I] (or [E, I] ungated) as gate_up_proj");
  bias_matches(down_bias, "down_bias", down, "[E, H] as down_proj");
  plan({slot_index, "slot_index"}, slots, {expert_offsets, "expert_offsets"}, x);
  size_is(slots, 0, x.size(0), "[T, K] for hidden_states [T, H]");
  dims(w, 2, "[T, K]");
  for (int64_t d = 0; d < 2; ++d) size_is(w, d, slots.size(d), "[T, K] as token_slot");
  dtype_is(w, accumulate_type(x.t.scalar_type()), "what sums are kept in");
  same_device(w, x);
  number_of_experts({expert_offsets, "expert_offsets"}, up);
}

void check_experts_backward(const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj,
                            const Tensor& down_proj, const Tensor& topk_weights, const Tensor& slot_index,
                            const Tensor& token_slot, const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                            const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
                            std::string_view activation) {
  check_experts_forward(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                        gate_up_bias, down_bias, activation);
  const Arg g{grad_output, "grad_output"};
  dims(g, 2, "[T, H]");
  for (int64_t d = 0; d < 2; ++d) size_is(g, d, hidden_states.sym_size(d), "[T, H] as hidden_states");
  dtype_is(g, hidden_states.scalar_type(), "hidden_states' dtype");
  same_device(g, {hidden_states, "hidden_states"});
  if (has(pre_activation)) {
    const Arg p{*pre_activation, "pre_activation"};
    dims(p, 2, "[P, 2 * I] (or [P, I] ungated)");
    size_is(p, 0, slot_index.sym_size(0), "[P, ...] as slot_index");
    size_is(p, 1, gate_up_proj.sym_size(1), "[..., 2 * I] as gate_up_proj");
    dtype_is(p, hidden_states.scalar_type(), "hidden_states' dtype");
    same_device(p, {hidden_states, "hidden_states"});
  }
}

void check_workspace(const OptionalTensor& workspace, const Tensor& hidden_states, const Tensor& gate_up_proj,
                     const Tensor& slot_index) {
  if (!has(workspace)) return;
  const Arg w{*workspace, "workspace"};
  dims(w, 2, "[P, 2 * I] (or [P, I] ungated)");
  size_is(w, 0, slot_index.sym_size(0), "[P, ...] as slot_index");
  size_is(w, 1, gate_up_proj.sym_size(1), "[..., 2 * I] as gate_up_proj");
  dtype_is(w, hidden_states.scalar_type(), "hidden_states' dtype");
  TORCH_CHECK_VALUE(w.t.is_contiguous(), "workspace must be contiguous, got strides ", w.t.sym_strides());
  same_device(w, {hidden_states, "hidden_states"});
}

void check_main_grads(const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_main_grad,
                      const OptionalTensor& down_main_grad) {
  const auto fits = [](const OptionalTensor& main_grad, const char* name, const Arg& weight, const char* contract) {
    if (!has(main_grad)) return;
    const Arg m{*main_grad, name};
    dims(m, 3, contract);
    for (int64_t d = 0; d < 3; ++d) size_is(m, d, weight.size(d), contract);
    dtype_is(m, accumulate_type(weight.t.scalar_type()), "what sums are kept in");
    TORCH_CHECK_VALUE(m.t.is_contiguous(), name, " must be contiguous, got strides ", m.t.sym_strides());
    same_device(m, weight);
  };
  fits(gate_up_main_grad, "gate_up_main_grad", {gate_up_proj, "gate_up_proj"}, "[E, 2 * I, H] as gate_up_proj");
  fits(down_main_grad, "down_main_grad", {down_proj, "down_proj"}, "[E, H, I] as down_proj");
}

void check_grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                          const OptionalTensor& bias) {
  const Arg x{rows, "rows"}, w{weight, "weight"}, offsets{expert_offsets, "expert_offsets"};
  dims(x, 2, "[S, in]");
  dims(w, 3, "[E, out, in]");
  dims(offsets, 1, "[E + 1]");
  floating(x);
  size_is(w, 2, x.size(1), "[E, out, in] for rows [S, in]");
  TORCH_CHECK_TYPE(w.t.scalar_type() == x.t.scalar_type(), "weight must have the dtype of rows, ", x.t.scalar_type(),
                   ", outside autocast, got ", w.t.scalar_type());
  dtype_is(offsets, at::kInt, "as dispatch returns it");
  TORCH_CHECK_VALUE(offsets.t.is_contiguous(), "expert_offsets must be contiguous, got strides ",
                    offsets.t.sym_strides());
  same_device(w, x);
  same_device(offsets, x);
  bias_matches(bias, "bias", w, "[E, out] as weight");
  number_of_experts(offsets, w);
}

void check_grouped_linear_backward(const Tensor& grad_output, const Tensor& rows, const Tensor& weight,
                                   const Tensor& expert_offsets) {
  check_grouped_linear(rows, weight, expert_offsets, std::nullopt);
  const Arg g{grad_output, "grad_output"};
  dims(g, 2, "[S, out]");
  size_is(g, 0, rows.sym_size(0), "[S, out] for rows [S, in]");
  size_is(g, 1, weight.sym_size(1), "[S, out] for weight [E, out, in]");
  dtype_is(g, rows.scalar_type(), "the dtype of rows");
  same_device(g, {rows, "rows"});
}

Tensor experts(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
               const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot,
               const Tensor& expert_offsets, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
               std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
               bool weight_on_input, bool recompute) {
  return FASTMOE_OP(experts).call(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot,
                                  expert_offsets, gate_up_bias, down_bias, activation, activation_alpha,
                                  activation_limit, interleaved, weight_on_input, recompute);
}

std::tuple<Tensor, Tensor> experts_forward(const Tensor& hidden_states, const Tensor& gate_up_proj,
                                           const Tensor& down_proj, const Tensor& topk_weights,
                                           const Tensor& slot_index, const Tensor& token_slot,
                                           const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                                           const OptionalTensor& down_bias, std::string_view activation,
                                           double activation_alpha, double activation_limit, bool interleaved,
                                           bool weight_on_input, bool keep_pre_activation) {
  return FASTMOE_OP(experts_forward)
      .call(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets, gate_up_bias,
            down_bias, activation, activation_alpha, activation_limit, interleaved, weight_on_input,
            keep_pre_activation);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
    std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
    bool weight_on_input, std::array<bool, 6> output_mask) {
  return FASTMOE_OP(experts_backward)
      .call(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
            gate_up_bias, down_bias, pre_activation, activation, activation_alpha, activation_limit, interleaved,
            weight_on_input, output_mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward_accumulate(
    const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
    std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
    bool weight_on_input, std::array<bool, 6> output_mask, const OptionalTensor& gate_up_main_grad,
    const OptionalTensor& down_main_grad, const OptionalTensor& workspace) {
  return FASTMOE_OP(experts_backward_accumulate)
      .call(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
            gate_up_bias, down_bias, pre_activation, activation, activation_alpha, activation_limit, interleaved,
            weight_on_input, output_mask, gate_up_main_grad, down_main_grad, workspace);
}

Tensor grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                      const OptionalTensor& bias) {
  return FASTMOE_OP(grouped_linear).call(rows, weight, expert_offsets, bias);
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(const Tensor& grad_output, const Tensor& rows,
                                                           const Tensor& weight, const Tensor& expert_offsets,
                                                           std::array<bool, 3> output_mask) {
  return FASTMOE_OP(grouped_linear_backward).call(grad_output, rows, weight, expert_offsets, output_mask);
}

}  // namespace fastmoe_cpp
