#include "function.h"

#include <torch/csrc/autograd/functions/basic_ops.h>

namespace fastmoe_cpp::autograd {
namespace {

void run_below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

bool any_requires_grad(const torch::jit::Stack& stack, size_t arguments) {
  for (size_t i = stack.size() - arguments; i < stack.size(); ++i)
    if (stack[i].isTensor() && stack[i].toTensor().defined() && stack[i].toTensor().requires_grad()) return true;
  return false;
}

}  // namespace

void refuse_double_backward(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const bool asked = at::GradMode::is_enabled() && any_requires_grad(*stack, schema.arguments().size());
  run_below_autograd(op, keys, stack);
  if (!asked) return;
  const auto message = schema.name() + " has no gradient of its own: differentiate through this layer once";
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    Tensor grad = (*stack)[i].toTensor();
    if (!grad.defined() || !grad.is_floating_point()) continue;
    grad = grad.detach();
    grad.requires_grad_(true);  // DelayedError passes through what needs no gradient
    auto error = std::make_shared<torch::autograd::DelayedError>(message, 1);
    (*stack)[i] = (*error)({grad})[0];
  }
}

void not_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  run_below_autograd(op, keys, stack);
}

}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp, Autograd, m) {
  using namespace fastmoe_cpp::autograd;
  const auto once = [] { return torch::CppFunction::makeFromBoxedFunction<&refuse_double_backward>(); };
  const auto never = [] { return torch::CppFunction::makeFromBoxedFunction<&not_differentiable>(); };
  m.impl("router_logits_backward", once());
  m.impl("route_backward", once());
  m.impl("gather_backward", once());
  m.impl("experts_forward", once());
  m.impl("experts_backward", once());
  m.impl("grouped_linear_backward", once());
  m.impl("combine_backward", once());
  m.impl("balance_loss_backward", once());
  m.impl("z_loss_backward", once());
  m.impl("sinkhorn", never());
  m.impl("dispatch", never());
  m.impl("expert_counts", never());
}
