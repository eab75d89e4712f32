#include "../ops/combine.h"

#include "function.h"

namespace fastmoe_cpp::autograd {
namespace {

struct Combine : torch::autograd::Function<Combine> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const OptionalTensor& topk_weights,
                        const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({rows, or_undefined(topk_weights), slot_index, token_slot, expert_offsets});
    return combine(rows, topk_weights, slot_index, token_slot, expert_offsets);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Wanted wanted(ctx, {true, saved[1].defined()});
    const auto [rows, weights] =
        combine_backward(grads[0], saved[0], optional(saved[1]), saved[2], saved[3], saved[4], {wanted(0), wanted(1)});
    return {grad_or_none(rows, wanted(0)), grad_or_none(weights, wanted(1)), Tensor(), Tensor(), Tensor()};
  }
};

Tensor combine_autograd(const Tensor& rows, const OptionalTensor& topk_weights, const Tensor& slot_index,
                        const Tensor& token_slot, const Tensor& expert_offsets) {
  if (recording({&rows, &or_undefined(topk_weights)}))
    return Combine::apply(rows, topk_weights, slot_index, token_slot, expert_offsets);
  at::AutoDispatchBelowADInplaceOrView guard;
  return combine(rows, topk_weights, slot_index, token_slot, expert_offsets);
}

}  // namespace
}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp, Autograd, m) { m.impl("combine", fastmoe_cpp::autograd::combine_autograd); }
