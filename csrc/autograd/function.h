// What every autograd Function here shares.
#pragma once
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <initializer_list>

#include "../ops/checks.h"

namespace fastmoe_cpp::autograd {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether any gradient will be asked for; where not, the operator runs below autograd and nothing is saved. A tangent of
// forward mode counts: the Function then says that it has no forward derivative, where the tangent would be lost.
inline bool recording(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (!t->defined()) continue;
    if (at::GradMode::is_enabled() && t->requires_grad()) return true;
    if (t->_fw_grad(/*level=*/0).defined()) return true;
  }
  return false;
}

inline const Tensor& or_undefined(const OptionalTensor& t) {
  static const Tensor undefined;
  return t ? *t : undefined;
}

// save_for_backward returns undefined tensors for None; the operators take nullopt.
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Autograd numbers the edges of a Function by its defined tensor arguments, in order. This asks for them by position.
class Wanted {
 public:
  Wanted(AutogradContext* ctx, std::initializer_list<bool> defined) : ctx_(ctx) {
    int64_t edge = 0;
    for (bool d : defined) edges_.push_back(d ? edge++ : -1);
  }
  bool operator()(size_t argument) const {
    return edges_[argument] >= 0 && ctx_->needs_input_grad(static_cast<size_t>(edges_[argument]));
  }

 private:
  AutogradContext* ctx_;
  std::vector<int64_t> edges_;
};

inline Tensor grad_or_none(const Tensor& grad, bool wanted) { return wanted ? grad : Tensor(); }

// Of what a node saves: whether nobody but the node will hold it, asked in forward (a saved-tensor hook would see it) ...
bool saves_for_itself();
// ... and whether backward, given grad, may overwrite it: this is the graph's last backward, and nothing traces it or
// runs it for a batch of gradients.
bool last_use(const Tensor& saved, const Tensor& grad);

// Backward operators run once: their own gradient is refused in one sentence, and only if somebody asks for it.
void refuse_double_backward(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);
// Operators with no gradient at all: plans, counts, selections.
void not_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

}  // namespace fastmoe_cpp::autograd
