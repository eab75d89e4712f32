#include "losses.h"

#include "checking.h"
#include "typed_call.h"

namespace fastmoe_cpp {
using namespace checking;

namespace {

void scalar_grad(const Tensor& grad_loss, const Arg& like) {
  const Arg g{grad_loss, "grad_loss"};
  dims(g, 0, "[] (one number)");
  dtype_is(g, accumulate_type(like.t.scalar_type()), "what the loss is kept in");
  same_device(g, like);
}

}  // namespace

void check_expert_counts(const Tensor& topk_ids, int64_t num_experts, const OptionalTensor& padding_mask) {
  const Arg ids{topk_ids, "topk_ids"};
  dims(ids, 3, "[S, L, K]");
  index_type(ids);
  TORCH_CHECK_VALUE(1 <= num_experts && num_experts <= kMaxExperts, "num_experts must be between 1 and ", kMaxExperts,
                    ", got ", num_experts);
  padding(padding_mask, ids, 2, "[S, L] for topk_ids [S, L, K]");
}

void check_balance_loss(const Tensor& scores, const Tensor& tokens_per_expert, const OptionalTensor& padding_mask) {
  const Arg s{scores, "scores"}, n{tokens_per_expert, "tokens_per_expert"};
  dims(s, 3, "[S, L, E]");
  floating(s);
  dims(n, 2, "[S, E]");
  size_is(n, 0, s.size(0), "[S, E] for scores [S, L, E]");
  size_is(n, 1, s.size(2), "[S, E] for scores [S, L, E]");
  TORCH_CHECK_TYPE(
      n.t.scalar_type() == at::kLong || n.t.scalar_type() == at::kFloat || n.t.scalar_type() == at::kDouble,
      "tokens_per_expert must be int64, float32 or float64, got ", n.t.scalar_type());
  same_device(n, s);
  padding(padding_mask, s, 2, "[S, L] for scores [S, L, E]");
}

void check_balance_loss_backward(const Tensor& grad_loss, const Tensor& scores, const Tensor& tokens_per_expert,
                                 const OptionalTensor& padding_mask) {
  check_balance_loss(scores, tokens_per_expert, padding_mask);
  scalar_grad(grad_loss, {scores, "scores"});
}

void check_z_loss(const Tensor& logits, const OptionalTensor& padding_mask) {
  const Arg l{logits, "logits"};
  dims(l, 2, "[T, E]");
  floating(l);
  padding(padding_mask, l, 1, "[T] for logits [T, E]");
}

void check_z_loss_backward(const Tensor& grad_loss, const Tensor& logits, const OptionalTensor& padding_mask) {
  check_z_loss(logits, padding_mask);
  scalar_grad(grad_loss, {logits, "logits"});
}

void check_update_expert_bias(const Tensor& expert_bias, const Tensor& tokens_per_expert) {
  const Arg b{expert_bias, "expert_bias"}, n{tokens_per_expert, "tokens_per_expert"};
  dims(b, 1, "[E]");
  dims(n, 1, "[E]");
  size_is(n, 0, b.size(0), "[E] as expert_bias");
  TORCH_CHECK_TYPE(b.t.scalar_type() == at::kFloat || b.t.scalar_type() == at::kDouble,
                   "expert_bias must be float32 or float64, got ", b.t.scalar_type());
  TORCH_CHECK_TYPE(
      n.t.scalar_type() == at::kLong || n.t.scalar_type() == at::kFloat || n.t.scalar_type() == at::kDouble,
      "tokens_per_expert must be int64, float32 or float64, got ", n.t.scalar_type());
  same_device(n, b);
}

Tensor expert_counts(const Tensor& topk_ids, int64_t num_experts, const OptionalTensor& padding_mask) {
  return FASTMOE_OP(expert_counts).call(topk_ids, num_experts, padding_mask);
}

Tensor balance_loss(const Tensor& scores, const Tensor& tokens_per_expert, double scale,
                    const OptionalTensor& padding_mask) {
  return FASTMOE_OP(balance_loss).call(scores, tokens_per_expert, scale, padding_mask);
}

Tensor balance_loss_backward(const Tensor& grad_loss, const Tensor& scores, const Tensor& tokens_per_expert,
                             double scale, const OptionalTensor& padding_mask) {
  return FASTMOE_OP(balance_loss_backward).call(grad_loss, scores, tokens_per_expert, scale, padding_mask);
}

Tensor z_loss(const Tensor& logits, double scale, const OptionalTensor& padding_mask) {
  return FASTMOE_OP(z_loss).call(logits, scale, padding_mask);
}

Tensor z_loss_backward(const Tensor& grad_loss, const Tensor& logits, double scale,
                       const OptionalTensor& padding_mask) {
  return FASTMOE_OP(z_loss_backward).call(grad_loss, logits, scale, padding_mask);
}

void update_expert_bias(const Tensor& expert_bias, const Tensor& tokens_per_expert, double rate, bool zero_mean) {
  // The schema's Tensor(a!) is a mutable reference in the typed signature.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastmoe_cpp::update_expert_bias", "")
                             .typed<void(Tensor&, const Tensor&, double, bool)>();
  Tensor bias = expert_bias;
  op.call(bias, tokens_per_expert, rate, zero_mean);
}

}  // namespace fastmoe_cpp
