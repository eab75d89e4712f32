#include "../losses.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "launch.h"

namespace fastmoe_cpp::cuda {
namespace {

CountType count_type(const Tensor& counts) {
  const auto type = counts.scalar_type();
  return type == at::kLong ? CountType::i64 : type == at::kFloat ? CountType::f32 : CountType::f64;
}

const bool* bools_or_null(const Tensor& mask) { return mask.defined() ? mask.const_data_ptr<bool>() : nullptr; }

Tensor scalar_like(const Tensor& t) { return at::empty({}, t.options().dtype(accumulate_type(t.scalar_type()))); }

Tensor partial_sums(const Tensor& like, int64_t n) { return at::empty({n}, like.options().dtype(at::kDouble)); }

Tensor expert_counts_op(const Tensor& topk_ids, int64_t num_experts, const OptionalTensor& padding_mask) {
  check_expert_counts(topk_ids, num_experts, padding_mask);
  const c10::cuda::CUDAGuard guard(topk_ids.device());
  const Tensor ids = topk_ids.contiguous(), mask = contiguous_as(padding_mask, at::kBool);
  const Tensor counts = at::zeros({ids.size(0), num_experts}, ids.options().dtype(at::kLong));
  ExpertCountsParams p{};
  p.sequences = ids.size(0);
  p.length = ids.size(1);
  p.top_k = static_cast<int>(ids.size(2));
  p.experts = static_cast<int>(num_experts);
  p.topk_ids = ids.const_data_ptr();
  p.wide_ids = ids.scalar_type() == at::kLong;
  p.padding_mask = bools_or_null(mask);
  p.counts = counts.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(expert_counts(p, c10::cuda::getCurrentCUDAStream()));
  return counts;
}

Tensor balance_loss_op(const Tensor& scores, const Tensor& tokens_per_expert, double scale,
                       const OptionalTensor& padding_mask) {
  check_balance_loss(scores, tokens_per_expert, padding_mask);
  const c10::cuda::CUDAGuard guard(scores.device());
  const Tensor s = scores.contiguous(), counts = tokens_per_expert.contiguous();
  const Tensor mask = contiguous_as(padding_mask, at::kBool), loss = scalar_like(s);
  const Tensor partial = partial_sums(s, loss_blocks(s.size(0) * s.size(1)));
  BalanceLossParams p{};
  p.dtype = dtype_of(s);
  p.sequences = s.size(0);
  p.length = s.size(1);
  p.experts = s.size(2);
  p.scores = s.const_data_ptr();
  p.counts = counts.const_data_ptr();
  p.count_type = count_type(counts);
  p.scale = scale;
  p.padding_mask = bools_or_null(mask);
  p.partial = partial.mutable_data_ptr<double>();
  p.loss = loss.mutable_data_ptr();
  C10_CUDA_CHECK(balance_loss(p, c10::cuda::getCurrentCUDAStream()));
  return loss;
}

Tensor balance_loss_backward_op(const Tensor& grad_loss, const Tensor& scores, const Tensor& tokens_per_expert,
                                double scale, const OptionalTensor& padding_mask) {
  check_balance_loss_backward(grad_loss, scores, tokens_per_expert, padding_mask);
  const c10::cuda::CUDAGuard guard(scores.device());
  const Tensor counts = tokens_per_expert.contiguous(), mask = contiguous_as(padding_mask, at::kBool);
  const Tensor grad = at::empty(scores.sizes(), scores.options());
  BalanceLossBackwardParams p{};
  p.dtype = dtype_of(scores);
  p.sequences = scores.size(0);
  p.length = scores.size(1);
  p.experts = scores.size(2);
  p.grad_loss = grad_loss.const_data_ptr();
  p.counts = counts.const_data_ptr();
  p.count_type = count_type(counts);
  p.scale = scale;
  p.padding_mask = bools_or_null(mask);
  p.grad_scores = grad.mutable_data_ptr();
  C10_CUDA_CHECK(balance_loss_backward(p, c10::cuda::getCurrentCUDAStream()));
  return grad;
}

Tensor z_loss_op(const Tensor& logits, double scale, const OptionalTensor& padding_mask) {
  check_z_loss(logits, padding_mask);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor l = logits.contiguous(), mask = contiguous_as(padding_mask, at::kBool), loss = scalar_like(l);
  const Tensor partial = partial_sums(l, 2 * loss_blocks(l.size(0)));
  ZLossParams p{};
  p.dtype = dtype_of(l);
  p.tokens = l.size(0);
  p.experts = l.size(1);
  p.logits = l.const_data_ptr();
  p.scale = scale;
  p.padding_mask = bools_or_null(mask);
  p.partial = partial.mutable_data_ptr<double>();
  p.loss = loss.mutable_data_ptr();
  C10_CUDA_CHECK(z_loss(p, c10::cuda::getCurrentCUDAStream()));
  return loss;
}

Tensor z_loss_backward_op(const Tensor& grad_loss, const Tensor& logits, double scale,
                          const OptionalTensor& padding_mask) {
  check_z_loss_backward(grad_loss, logits, padding_mask);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor l = logits.contiguous(), mask = contiguous_as(padding_mask, at::kBool);
  const Tensor grad = at::empty(l.sizes(), l.options());
  const Tensor partial = mask.defined() ? partial_sums(l, loss_blocks(l.size(0))) : Tensor();
  ZLossBackwardParams p{};
  p.dtype = dtype_of(l);
  p.tokens = l.size(0);
  p.experts = l.size(1);
  p.grad_loss = grad_loss.const_data_ptr();
  p.logits = l.const_data_ptr();
  p.scale = scale;
  p.padding_mask = bools_or_null(mask);
  p.partial = partial.defined() ? partial.mutable_data_ptr<double>() : nullptr;
  p.grad_logits = grad.mutable_data_ptr();
  C10_CUDA_CHECK(z_loss_backward(p, c10::cuda::getCurrentCUDAStream()));
  return grad;
}

void update_expert_bias_op(Tensor& expert_bias, const Tensor& tokens_per_expert, double rate, bool zero_mean) {
  check_update_expert_bias(expert_bias, tokens_per_expert);
  const c10::cuda::CUDAGuard guard(expert_bias.device());
  const Tensor bias = expert_bias.contiguous(), counts = tokens_per_expert.contiguous();
  UpdateExpertBiasParams p{};
  p.wide_bias = bias.scalar_type() == at::kDouble;
  p.experts = bias.size(0);
  p.bias = bias.mutable_data_ptr();
  p.counts = counts.const_data_ptr();
  p.count_type = count_type(counts);
  p.rate = rate;
  p.zero_mean = zero_mean;
  C10_CUDA_CHECK(update_expert_bias(p, c10::cuda::getCurrentCUDAStream()));
  if (!bias.is_same(expert_bias)) expert_bias.copy_(bias);
}

}  // namespace
}  // namespace fastmoe_cpp::cuda

TORCH_LIBRARY_IMPL(fastmoe_cpp, CUDA, m) {
  m.impl("expert_counts", fastmoe_cpp::cuda::expert_counts_op);
  m.impl("balance_loss", fastmoe_cpp::cuda::balance_loss_op);
  m.impl("balance_loss_backward", fastmoe_cpp::cuda::balance_loss_backward_op);
  m.impl("z_loss", fastmoe_cpp::cuda::z_loss_op);
  m.impl("z_loss_backward", fastmoe_cpp::cuda::z_loss_backward_op);
  m.impl("update_expert_bias", fastmoe_cpp::cuda::update_expert_bias_op);
}
