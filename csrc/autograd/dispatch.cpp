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

// Where gradients are asked for, the three operators that it consists of have them.
RoutedTokens route_and_dispatch_autograd(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias,
                                         int64_t top_k, const OptionalTensor& expert_bias,
                                         std::string_view score_function, bool scores_after_topk, bool renormalize,
                                         double renormalize_epsilon, double scaling_factor, int64_t num_groups,
                                         int64_t topk_groups, std::string_view group_score) {
  const auto run = [&](auto function) {
    return function(hidden_states, weight, bias, top_k, expert_bias, score_function, scores_after_topk, renormalize,
                    renormalize_epsilon, scaling_factor, num_groups, topk_groups, group_score);
  };
  if (recording({&hidden_states, &weight, &or_undefined(bias)})) return run(route_then_dispatch);
  at::AutoDispatchBelowADInplaceOrView guard;
  return run(route_and_dispatch);
}

}  // namespace
}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp, Autograd, m) {
  m.impl("gather", fastmoe_cpp::autograd::gather_autograd);
  m.impl("route_and_dispatch", fastmoe_cpp::autograd::route_and_dispatch_autograd);
}
