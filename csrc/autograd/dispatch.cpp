#include "../ops/dispatch.h"

#include "function.h"

namespace fastmoe_cpp::autograd {
namespace {

struct Gather : torch::autograd::Function<Gather> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden_states, const Tensor& slot_index,
                        const Tensor& token_slot, const Tensor& expert_offsets) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({token_slot});
    return gather(hidden_states, slot_index, token_slot, expert_offsets);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {gather_backward(grads[0], ctx->get_saved_variables()[0]), Tensor(), Tensor(), Tensor()};
  }
};

Tensor gather_autograd(const Tensor& hidden_states, const Tensor& slot_index, const Tensor& token_slot,
                       const Tensor& expert_offsets) {
  if (recording({&hidden_states})) return Gather::apply(hidden_states, slot_index, token_slot, expert_offsets);
  at::AutoDispatchBelowADInplaceOrView guard;
  return gather(hidden_states, slot_index, token_slot, expert_offsets);
}

}  // namespace
}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp, Autograd, m) { m.impl("gather", fastmoe_cpp::autograd::gather_autograd); }
