#include "function.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <memory>
#include <type_traits>

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

// What owns a node: std::shared_ptr in torch 2.11, c10::intrusive_ptr in 2.15.
using NodePointer = decltype(torch::autograd::Edge::function);

template <typename N, typename Pointer = NodePointer>
Pointer make_node(std::string message) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<N>(std::move(message));
  } else {
    return c10::make_intrusive<N>(std::move(message));
  }
}

variable_list arguments_that_require_grad(const torch::jit::Stack& stack, size_t arguments) {
  variable_list tensors;
  for (size_t i = stack.size() - arguments; i < stack.size(); ++i)
    if (stack[i].isTensor() && stack[i].toTensor().defined() && stack[i].toTensor().requires_grad())
      tensors.push_back(stack[i].toTensor());
  return tensors;
}

}  // namespace

bool saves_for_itself() { return !at::SavedTensorDefaultHooks::get_hooks().has_value(); }

bool last_use(const Tensor& saved, const Tensor& grad) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !at::isTensorSubclassLike(saved) &&
         !at::isTensorSubclassLike(grad);
}

void refuse_double_backward(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  variable_list asking;
  if (at::GradMode::is_enabled()) asking = arguments_that_require_grad(*stack, schema.arguments().size());
  run_below_autograd(op, keys, stack);
  if (asking.empty()) return;
  const NodePointer refusal =
      make_node<Refusal>(schema.name() + " has no gradient of its own: differentiate through this layer once");
  refusal->set_next_edges(torch::autograd::collect_next_edges(asking));
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    const Tensor grad = (*stack)[i].toTensor();
    if (grad.defined() && grad.is_floating_point()) torch::autograd::set_history(grad, refusal);
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
  m.impl("experts_backward_accumulate", once());
  m.impl("grouped_linear_backward", once());
  m.impl("combine_backward", once());
  m.impl("balance_loss_backward", once());
  m.impl("z_loss_backward", once());
  m.impl("sinkhorn", never());
  m.impl("dispatch", never());
  m.impl("expert_counts", never());
}
