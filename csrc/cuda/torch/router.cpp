#include "../router.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "launch.h"
#include "router_params.h"

namespace fastmoe_cpp::cuda {
namespace {

// --- logits: matrix products with float32 results, of 16-bit operands as they are ---

at::ScalarType logits_type(const Tensor& hidden_states, const Tensor& weight) {
  const bool wide = hidden_states.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

// Results of this many numbers fill every GPU with tiles. cuBLAS may cut the contraction of a smaller product into
// parts and round their sums to the result's type before it adds them, so that one is asked for in float32.
constexpr int64_t kManyResults = 1 << 22;

// a @ b with results of `type`: the operands' own, or float32 of two bfloat16 or float16 operands.
Tensor product(const Tensor& a, const Tensor& b, at::ScalarType type) {
  if (a.numel() == 0 || b.numel() == 0) return at::zeros({a.size(0), b.size(1)}, a.options().dtype(type));
  if (type == at::kBFloat16 && a.size(0) * b.size(1) < kManyResults) return at::mm(a, b, at::kFloat).to(type);
  return a.scalar_type() == type ? at::mm(a, b) : at::mm(a, b, type);
}

// x [outer, inner] float32 -> [outer, parts, inner] bfloat16 whose sum over parts is x to 8 * parts bits.
Tensor split(const Tensor& x, int64_t outer, int parts) {
  const Tensor in = x.contiguous();
  const int64_t inner = outer ? in.numel() / outer : 0;
  const Tensor out = at::empty({outer, parts, inner}, in.options().dtype(at::kBFloat16));
  SplitParams p{};
  p.outer = outer;
  p.inner = inner;
  p.parts = parts;
  p.in = in.const_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(split_bf16(p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

Tensor router_logits_op(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias) {
  check_router_logits(hidden_states, weight, bias);
  const c10::cuda::CUDAGuard guard(hidden_states.device());
  const auto type = logits_type(hidden_states, weight), x_type = hidden_states.scalar_type();
  const int64_t tokens = hidden_states.size(0), hidden = hidden_states.size(1), experts = weight.size(0);
  Tensor logits;
  if (tokens <= kMaxFewTokens && type == at::kFloat) {
    const Tensor x = hidden_states.contiguous(), w = weight.contiguous(), b = contiguous_as(bias, at::kFloat);
    logits = empty({tokens, experts}, at::kFloat, x.device());
    const FewLogitsParams p = few_logits(x, w, b, logits);
    bool taken;
    C10_CUDA_CHECK(takes_logits_of_few(p, &taken));
    if (taken) {
      C10_CUDA_CHECK(logits_of_few(p, c10::cuda::getCurrentCUDAStream()));
      return logits;
    }
  }
  if (x_type == weight.scalar_type()) {
    logits = product(hidden_states, weight.t(), type);
  } else if (x_type == at::kBFloat16 && type == at::kFloat) {
    // three bfloat16 parts hold all of a float32 weight, and no float32 copy of the hidden states is made
    const Tensor parts = split(weight.to(at::kFloat), 1, 3).view({3 * experts, hidden});
    logits = product(hidden_states, parts.t(), type).view({tokens, 3, experts}).sum(1);
  } else {
    logits = product(hidden_states.to(type), weight.to(type).t(), type);
  }
  return has(bias) ? logits.add_(bias->to(type)) : logits;
}

std::tuple<Tensor, Tensor, Tensor> router_logits_backward_op(const Tensor& grad_logits, const Tensor& hidden_states,
                                                             const Tensor& weight, std::array<bool, 3> output_mask) {
  check_router_logits_backward(grad_logits, hidden_states, weight);
  const c10::cuda::CUDAGuard guard(hidden_states.device());
  const auto type = logits_type(hidden_states, weight), x_type = hidden_states.scalar_type();
  const int64_t tokens = hidden_states.size(0), hidden = hidden_states.size(1), experts = weight.size(0);
  const Tensor grad = grad_logits.to(type);
  Tensor grad_hidden = at::empty({0}, hidden_states.options()), grad_weight = at::empty({0}, weight.options());
  Tensor grad_bias = at::empty({0}, grad_logits.options());
  if (x_type == at::kBFloat16 && type == at::kFloat && (output_mask[0] || output_mask[1])) {
    // bfloat16 parts of the float32 factors: as many as the result can hold, and no float32 copy of anything [T, H]
    const bool wide_weight = weight.scalar_type() != at::kBFloat16;
    const int count = wide_weight ? 3 : 2;
    const Tensor parts = split(grad, tokens, count).view({tokens, count * experts}),
                 two = parts.narrow(1, 0, 2 * experts);
    if (output_mask[0] && wide_weight) {
      const Tensor w = split(weight.to(at::kFloat), 1, 2).view({2, experts, hidden});
      grad_hidden = product(at::cat({two, parts.narrow(1, 0, experts)}, 1), at::cat({w[0], w[0], w[1]}), x_type);
    } else if (output_mask[0]) {
      grad_hidden = product(two, at::cat({weight, weight}), x_type);
    }
    if (output_mask[1])
      grad_weight =
          product(parts.t(), hidden_states, type).view({count, experts, hidden}).sum(0).to(weight.scalar_type());
  } else {
    if (output_mask[0]) grad_hidden = product(grad, weight.to(type), type).to(x_type);
    if (output_mask[1]) grad_weight = product(grad.t(), hidden_states.to(type), type).to(weight.scalar_type());
  }
  if (output_mask[2]) grad_bias = grad.sum(0).to(grad_logits.scalar_type());
  return {grad_hidden, grad_weight, grad_bias};
}

// --- routing ---

std::tuple<Tensor, Tensor, Tensor> route_op(const Tensor& logits, int64_t top_k, const OptionalTensor& expert_bias,
                                            const OptionalTensor& selection_scores, const OptionalTensor& topk_ids,
                                            std::string_view score_function, bool scores_after_topk, bool renormalize,
                                            double renormalize_epsilon, double scaling_factor, int64_t num_groups,
                                            int64_t topk_groups, std::string_view group_score) {
  check_route(logits, top_k, expert_bias, selection_scores, topk_ids, score_function, renormalize_epsilon,
              scaling_factor, num_groups, topk_groups, group_score);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto acc = accumulate_type(logits.scalar_type());
  const Tensor l = logits.contiguous(), bias = contiguous_as(expert_bias, acc);
  const Tensor selection = contiguous_as(selection_scores, acc), replay = contiguous_as(topk_ids, at::kLong);
  const Tensor weights = empty({l.size(0), top_k}, acc, l.device());
  const Tensor ids = empty({l.size(0), top_k}, at::kLong, l.device()), scores = empty(l.sizes(), acc, l.device());
  RouteParams p{};
  p.dtype = dtype_of(l);
  p.tokens = l.size(0);
  p.experts = static_cast<int>(l.size(1));
  p.top_k = static_cast<int>(top_k);
  p.logits = l.const_data_ptr();
  p.expert_bias = data_or_null(bias);
  p.selection_scores = data_or_null(selection);
  p.replay_ids = replay.defined() ? replay.const_data_ptr<int64_t>() : nullptr;
  p.weighting = weighting(score_function, scores_after_topk, renormalize, renormalize_epsilon, scaling_factor);
  p.num_groups = static_cast<int>(num_groups);
  p.topk_groups = static_cast<int>(topk_groups);
  p.group_rank = static_cast<GroupRank>(parse_group_score(group_score));
  p.topk_weights = weights.mutable_data_ptr();
  p.topk_ids = ids.mutable_data_ptr<int64_t>();
  p.scores = scores.mutable_data_ptr();
  C10_CUDA_CHECK(route(p, c10::cuda::getCurrentCUDAStream()));
  return {weights, ids, scores};
}

Tensor route_backward_op(const OptionalTensor& grad_topk_weights, const OptionalTensor& grad_scores,
                         const Tensor& logits, const Tensor& topk_ids, std::string_view score_function,
                         bool scores_after_topk, bool renormalize, double renormalize_epsilon, double scaling_factor) {
  check_route_backward(grad_topk_weights, grad_scores, logits, topk_ids, score_function);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto acc = accumulate_type(logits.scalar_type());
  const Tensor l = logits.contiguous(), ids = contiguous_as(topk_ids, at::kLong);
  const Tensor grad_weights = contiguous_as(grad_topk_weights, acc), grad_all = contiguous_as(grad_scores, acc);
  const Tensor grad = at::empty(l.sizes(), l.options());
  RouteBackwardParams p{};
  p.dtype = dtype_of(l);
  p.tokens = l.size(0);
  p.experts = static_cast<int>(l.size(1));
  p.top_k = static_cast<int>(ids.size(1));
  p.grad_topk_weights = data_or_null(grad_weights);
  p.grad_scores = data_or_null(grad_all);
  p.logits = l.const_data_ptr();
  p.topk_ids = ids.const_data_ptr<int64_t>();
  p.weighting = weighting(score_function, scores_after_topk, renormalize, renormalize_epsilon, scaling_factor);
  p.grad_logits = grad.mutable_data_ptr();
  C10_CUDA_CHECK(route_backward(p, c10::cuda::getCurrentCUDAStream()));
  return grad;
}

Tensor sinkhorn_op(const Tensor& logits, int64_t iterations, double tolerance) {
  check_sinkhorn(logits, iterations, tolerance);
  TORCH_CHECK_VALUE(logits.size(1) <= kMaxRouterExperts, "logits must have at most ", kMaxRouterExperts,
                    " experts, got ", logits.sizes());
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto options = logits.options().dtype(accumulate_type(logits.scalar_type()));
  const Tensor l = logits.contiguous(), out = at::empty(l.sizes(), options);
  if (l.numel() == 0) return out;
  SinkhornParams p{};
  p.dtype = dtype_of(l);
  p.tokens = l.size(0);
  p.experts = static_cast<int>(l.size(1));
  p.logits = l.const_data_ptr();
  p.iterations = static_cast<int>(iterations);
  p.tolerance = tolerance;
  int64_t blocks = 0;
  C10_CUDA_CHECK(sinkhorn_blocks(p, &blocks));
  const Tensor rows = at::empty({p.tokens}, options), columns = at::empty({2, p.experts}, options);
  const Tensor partial = at::empty({blocks, p.experts}, options);
  p.out = out.mutable_data_ptr();
  p.row_scale = rows.mutable_data_ptr();
  p.column_scale = columns.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  C10_CUDA_CHECK(sinkhorn(p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace fastmoe_cpp::cuda

TORCH_LIBRARY_IMPL(fastmoe_cpp, CUDA, m) {
  m.impl("router_logits", fastmoe_cpp::cuda::router_logits_op);
  m.impl("router_logits_backward", fastmoe_cpp::cuda::router_logits_backward_op);
  m.impl("route", fastmoe_cpp::cuda::route_op);
  m.impl("route_backward", fastmoe_cpp::cuda::route_backward_op);
  m.impl("sinkhorn", fastmoe_cpp::cuda::sinkhorn_op);
}
