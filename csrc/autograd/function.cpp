#include "function.h"

#include <torch/csrc/autograd/functions/utils.h>

namespace fastmoe_cpp::autograd {
namespace {

void run_below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// Stands where the gradient of a backward operator would be. Its edges lead to the arguments, so that whoever asks for
// that gradient reaches it.
struct Refusal : torch::autograd::Node {
  explicit Refusal(std::string message) : message(std::move(message)) {}
  variable_list apply(variable_list&&) override { TORCH_CHECK(false, message); }
  std::string message;
};

variable_list arguments_that_require_grad(const torch::jit::Stack& stack, size_t arguments) {
  variable_list tensors;
  for (size_t i = stack.size() - arguments; i < stack.size(); ++i)
    if (stack[i].isTensor() && stack[i].toTensor().defined() && stack[i].toTensor().requires_grad())
      tensors.push_back(stack[i].toTensor());
  return tensors;
}

}  // namespace

void refuse_double_backward(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  variable_list asking;
  if (at::GradMode::is_enabled()) asking = arguments_that_require_grad(*stack, schema.arguments().size());
  run_below_autograd(op, keys, stack);
  if (asking.empty()) return;
  const std::shared_ptr<torch::autograd::Node> refusal(
      new Refusal(schema.name() + " has no gradient of its own: differentiate through this layer once"),
      torch::autograd::deleteNode);
  refusal->set_next_edges(torch::autograd::collect_next_edges(asking));
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    const Tensor grad = (*stack)[i].toTensor();
    if (grad.defined() && grad.is_floating_point()) torch::autograd::set_history(grad, refusal);
  }
}

void not_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  run_below_autograd(op, keys, stack);
}

void refuse_none(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = (*stack)[stack->size() - arguments.size() + i];
    const bool is_tensor = arguments[i].type()->kind() == c10::TypeKind::TensorType;
    TORCH_CHECK_VALUE(!is_tensor || (value.isTensor() && value.toTensor().defined()), arguments[i].name(),
                      " must be a tensor, got None");
  }
  TORCH_CHECK_VALUE(false, op.schema().name(), " must be given a tensor, got None alone");
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

TORCH_LIBRARY_IMPL(fastmoe_cpp, Undefined, m) {
  for (const char* name : {"router_logits",
                           "router_logits_backward",
                           "route",
                           "route_backward",
                           "sinkhorn",
                           "dispatch",
                           "gather",
                           "gather_backward",
                           "experts",
                           "experts_forward",
                           "experts_backward",
                           "grouped_linear",
                           "grouped_linear_backward",
                           "combine",
                           "combine_backward",
                           "expert_counts",
                           "balance_loss",
                           "balance_loss_backward",
                           "z_loss",
                           "z_loss_backward",
                           "update_expert_bias"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fastmoe_cpp::autograd::refuse_none>());
  }
}
