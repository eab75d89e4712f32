#include "../ops/experts.h"

#include "function.h"

namespace fastmoe_cpp::autograd {
namespace {

// Backward keeps the hidden states, the weights, the plan and (unless recomputed) the pre-activation: neither the
// activation nor a single output row of an expert. The pre-activation's gradient takes its place where it can.
struct Experts : torch::autograd::Function<Experts> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden_states, const Tensor& gate_up_proj,
                        const Tensor& down_proj, const Tensor& topk_weights, const Tensor& slot_index,
                        const Tensor& token_slot, const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                        const OptionalTensor& down_bias, std::string_view activation, double activation_alpha,
                        double activation_limit, bool interleaved, bool weight_on_input, bool recompute) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, pre_activation] = experts_forward(
        hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets, gate_up_bias,
        down_bias, activation, activation_alpha, activation_limit, interleaved, weight_on_input, !recompute);
    ctx->save_for_backward({hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot,
                            expert_offsets, or_undefined(gate_up_bias), or_undefined(down_bias),
                            recompute ? Tensor() : pre_activation});
    auto& data = ctx->saved_data;
    data["activation"] = std::string(activation);
    data["activation_alpha"] = activation_alpha;
    data["activation_limit"] = activation_limit;
    data["interleaved"] = interleaved;
    data["weight_on_input"] = weight_on_input;
    data["own"] = !recompute && saves_for_itself();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const std::string activation = data["activation"].toStringRef();
    const bool up_bias = saved[7].defined(), down_bias = saved[8].defined();
    const Wanted wanted(ctx, {true, true, true, true, true, true, true, up_bias, down_bias});
    TORCH_CHECK(!data.count("overwritten"),
                "experts: a backward that failed has overwritten what forward kept; run "
                "forward again, or let backward keep the graph (retain_graph=True)");
    const auto run = [&](auto backward, auto... to) {
      return backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                      optional(saved[7]), optional(saved[8]), optional(saved[9]), activation,
                      data["activation_alpha"].toDouble(), data["activation_limit"].toDouble(),
                      data["interleaved"].toBool(), data["weight_on_input"].toBool(),
                      std::array<bool, 6>{wanted(0), wanted(1), wanted(2), wanted(3), wanted(7), wanted(8)}, to...);
    };
    const bool overwrites = data["own"].toBool() && last_use(saved[9], grads[0]);
    if (overwrites) data["overwritten"] = true;
    const OptionalTensor none;
    const auto [hidden, gate_up, down, weights, gate_up_bias_grad, down_bias_grad] =
        overwrites ? run(experts_backward_accumulate, none, none, OptionalTensor(saved[9])) : run(experts_backward);
    variable_list out(15);
    out[0] = grad_or_none(hidden, wanted(0));
    out[1] = grad_or_none(gate_up, wanted(1));
    out[2] = grad_or_none(down, wanted(2));
    out[3] = grad_or_none(weights, wanted(3));
    out[7] = grad_or_none(gate_up_bias_grad, wanted(7));
    out[8] = grad_or_none(down_bias_grad, wanted(8));
    return out;
  }
};

// Routing weights may come in any floating type; where autograd is on the cast is recorded, so that their gradient goes
// back in it. None is left for the check to name.
Tensor in_accumulate_type(const Tensor& topk_weights, const Tensor& hidden_states) {
  return topk_weights.defined() && hidden_states.defined()
             ? topk_weights.to(accumulate_type(hidden_states.scalar_type()))
             : topk_weights;
}

Tensor experts_autograd(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
                        const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot,
                        const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                        const OptionalTensor& down_bias, std::string_view activation, double activation_alpha,
                        double activation_limit, bool interleaved, bool weight_on_input, bool recompute) {
  if (recording({&hidden_states, &gate_up_proj, &down_proj, &topk_weights, &or_undefined(gate_up_bias),
                 &or_undefined(down_bias)})) {
    return Experts::apply(hidden_states, gate_up_proj, down_proj, in_accumulate_type(topk_weights, hidden_states),
                          slot_index, token_slot, expert_offsets, gate_up_bias, down_bias, activation, activation_alpha,
                          activation_limit, interleaved, weight_on_input, recompute);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return experts(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                 gate_up_bias, down_bias, activation, activation_alpha, activation_limit, interleaved, weight_on_input,
                 recompute);
}

// Without autograd: the same forward, and nothing kept.
Tensor experts_inference(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
                         const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot,
                         const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                         const OptionalTensor& down_bias, std::string_view activation, double activation_alpha,
                         double activation_limit, bool interleaved, bool weight_on_input, bool /*recompute*/) {
  return std::get<0>(experts_forward(hidden_states, gate_up_proj, down_proj,
                                     in_accumulate_type(topk_weights, hidden_states), slot_index, token_slot,
                                     expert_offsets, gate_up_bias, down_bias, activation, activation_alpha,
                                     activation_limit, interleaved, weight_on_input, false));
}

struct GroupedLinear : torch::autograd::Function<GroupedLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({rows, weight, expert_offsets});
    ctx->saved_data["has_bias"] = has(bias);
    return grouped_linear(rows, weight, expert_offsets, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx, {true, true, true, ctx->saved_data["has_bias"].toBool()});
    const auto [rows, weight, bias] =
        grouped_linear_backward(grads[0], saved[0], saved[1], saved[2], {wanted(0), wanted(1), wanted(3)});
    return {grad_or_none(rows, wanted(0)), grad_or_none(weight, wanted(1)), Tensor(), grad_or_none(bias, wanted(3))};
  }
};

Tensor grouped_linear_autograd(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                               const OptionalTensor& bias) {
  if (recording({&rows, &weight, &or_undefined(bias)})) return GroupedLinear::apply(rows, weight, expert_offsets, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  return grouped_linear(rows, weight, expert_offsets, bias);
}

}  // namespace
}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp, Autograd, m) {
  m.impl("experts", fastmoe_cpp::autograd::experts_autograd);
  m.impl("grouped_linear", fastmoe_cpp::autograd::grouped_linear_autograd);
}

TORCH_LIBRARY_IMPL(fastmoe_cpp, CompositeExplicitAutograd, m) {
  m.impl("experts", fastmoe_cpp::autograd::experts_inference);
}
