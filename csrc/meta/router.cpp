#include <ATen/ATen.h>
#include <torch/library.h>

#include "../ops/checks.h"

namespace fastmoe_cpp::meta {
namespace {

Tensor router_logits(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias) {
  check_router_logits(hidden_states, weight, bias);
  const bool wide = hidden_states.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble;
  return at::empty_symint({hidden_states.sym_size(0), weight.sym_size(0)},
                          hidden_states.options().dtype(wide ? at::kDouble : at::kFloat));
}

std::tuple<Tensor, Tensor, Tensor> router_logits_backward(const Tensor& grad_logits, const Tensor& hidden_states,
                                                          const Tensor& weight, std::array<bool, 3> output_mask) {
  check_router_logits_backward(grad_logits, hidden_states, weight);
  const auto like = [](const Tensor& t, bool wanted) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::empty({0}, t.options());
  };
  return {like(hidden_states, output_mask[0]), like(weight, output_mask[1]),
          output_mask[2] ? at::empty_symint({weight.sym_size(0)}, grad_logits.options())
                         : at::empty({0}, grad_logits.options())};
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, int64_t top_k, const OptionalTensor& expert_bias,
                                         const OptionalTensor& selection_scores, const OptionalTensor& topk_ids,
                                         std::string_view score_function, bool /*scores_after_topk*/,
                                         bool /*renormalize*/, double renormalize_epsilon, double scaling_factor,
                                         int64_t num_groups, int64_t topk_groups, std::string_view group_score) {
  check_route(logits, top_k, expert_bias, selection_scores, topk_ids, score_function, renormalize_epsilon,
              scaling_factor, num_groups, topk_groups, group_score);
  const auto options = logits.options().dtype(accumulate_type(logits.scalar_type()));
  return {at::empty_symint({logits.sym_size(0), top_k}, options),
          at::empty_symint({logits.sym_size(0), top_k}, options.dtype(at::kLong)),
          at::empty_symint(logits.sym_sizes(), options)};
}

Tensor route_backward(const OptionalTensor& grad_topk_weights, const OptionalTensor& grad_scores, const Tensor& logits,
                      const Tensor& topk_ids, std::string_view score_function, bool, bool, double, double) {
  check_route_backward(grad_topk_weights, grad_scores, logits, topk_ids, score_function);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

Tensor sinkhorn(const Tensor& logits, int64_t iterations, double tolerance) {
  check_sinkhorn(logits, iterations, tolerance);
  return at::empty_symint(logits.sym_sizes(), logits.options().dtype(accumulate_type(logits.scalar_type())));
}

}  // namespace
}  // namespace fastmoe_cpp::meta

TORCH_LIBRARY_IMPL(fastmoe_cpp, Meta, m) {
  using namespace fastmoe_cpp::meta;
  m.impl("router_logits", router_logits);
  m.impl("router_logits_backward", router_logits_backward);
  m.impl("route", route);
  m.impl("route_backward", route_backward);
  m.impl("sinkhorn", sinkhorn);
}
