#include <ATen/ATen.h>
#include <torch/library.h>

#include "../ops/checks.h"

namespace fastmoe_cpp::meta {
namespace {

Tensor scalar(const Tensor& like) { return at::empty({}, like.options().dtype(accumulate_type(like.scalar_type()))); }

Tensor expert_counts(const Tensor& topk_ids, int64_t num_experts, const OptionalTensor& padding_mask) {
  check_expert_counts(topk_ids, num_experts, padding_mask);
  return at::empty_symint({topk_ids.sym_size(0), num_experts}, topk_ids.options().dtype(at::kLong));
}

Tensor balance_loss(const Tensor& scores, const Tensor& tokens_per_expert, double, const OptionalTensor& padding_mask) {
  check_balance_loss(scores, tokens_per_expert, padding_mask);
  return scalar(scores);
}

Tensor balance_loss_backward(const Tensor& grad_loss, const Tensor& scores, const Tensor& tokens_per_expert, double,
                             const OptionalTensor& padding_mask) {
  check_balance_loss_backward(grad_loss, scores, tokens_per_expert, padding_mask);
  return at::empty_symint(scores.sym_sizes(), scores.options());
}

Tensor z_loss(const Tensor& logits, double, const OptionalTensor& padding_mask) {
  check_z_loss(logits, padding_mask);
  return scalar(logits);
}

Tensor z_loss_backward(const Tensor& grad_loss, const Tensor& logits, double, const OptionalTensor& padding_mask) {
  check_z_loss_backward(grad_loss, logits, padding_mask);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

void update_expert_bias(Tensor& expert_bias, const Tensor& tokens_per_expert, double, bool) {
  check_update_expert_bias(expert_bias, tokens_per_expert);
}

}  // namespace
}  // namespace fastmoe_cpp::meta

TORCH_LIBRARY_IMPL(fastmoe_cpp, Meta, m) {
  using namespace fastmoe_cpp::meta;
  m.impl("expert_counts", expert_counts);
  m.impl("balance_loss", balance_loss);
  m.impl("balance_loss_backward", balance_loss_backward);
  m.impl("z_loss", z_loss);
  m.impl("z_loss_backward", z_loss_backward);
  m.impl("update_expert_bias", update_expert_bias);
}
