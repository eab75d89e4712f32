#include "../ops/losses.h"

#include "function.h"

namespace fastmoe_cpp::autograd {
namespace {

struct BalanceLoss : torch::autograd::Function<BalanceLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& scores, const Tensor& tokens_per_expert, double scale,
                        const OptionalTensor& padding_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({scores, tokens_per_expert, or_undefined(padding_mask)});
    ctx->saved_data["scale"] = scale;
    return balance_loss(scores, tokens_per_expert, scale, padding_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {
        balance_loss_backward(grads[0], saved[0], saved[1], ctx->saved_data["scale"].toDouble(), optional(saved[2])),
        Tensor(), Tensor(), Tensor()};
  }
};

Tensor balance_loss_autograd(const Tensor& scores, const Tensor& tokens_per_expert, double scale,
                             const OptionalTensor& padding_mask) {
  // Counts are of a discrete choice; given as floating point they still carry no gradient.
  if (recording({&scores})) return BalanceLoss::apply(scores, tokens_per_expert.detach(), scale, padding_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return balance_loss(scores, tokens_per_expert, scale, padding_mask);
}

struct ZLoss : torch::autograd::Function<ZLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, double scale, const OptionalTensor& padding_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({logits, or_undefined(padding_mask)});
    ctx->saved_data["scale"] = scale;
    return z_loss(logits, scale, padding_mask);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    return {z_loss_backward(grads[0], saved[0], ctx->saved_data["scale"].toDouble(), optional(saved[1])), Tensor(),
            Tensor()};
  }
};

Tensor z_loss_autograd(const Tensor& logits, double scale, const OptionalTensor& padding_mask) {
  if (recording({&logits})) return ZLoss::apply(logits, scale, padding_mask);
  at::AutoDispatchBelowADInplaceOrView guard;
  return z_loss(logits, scale, padding_mask);
}

void update_expert_bias_autograd(Tensor& expert_bias, const Tensor& tokens_per_expert, double rate, bool zero_mean) {
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && expert_bias.requires_grad()),
                    "expert_bias must not require a gradient (it is updated in place by counts), got one that does");
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    update_expert_bias(expert_bias, tokens_per_expert, rate, zero_mean);
  }
  torch::autograd::impl::bump_version(expert_bias);
}

}  // namespace
}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp, Autograd, m) {
  m.impl("balance_loss", fastmoe_cpp::autograd::balance_loss_autograd);
  m.impl("z_loss", fastmoe_cpp::autograd::z_loss_autograd);
  m.impl("update_expert_bias", fastmoe_cpp::autograd::update_expert_bias_autograd);
}
