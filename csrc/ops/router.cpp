#include "router.h"

#include "checking.h"
#include "typed_call.h"

namespace fastmoe_cpp {
using namespace checking;

void check_router_logits(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias) {
  const Arg x{hidden_states, "hidden_states"}, w{weight, "weight"};
  dims(x, 2, "[T, H]");
  dims(w, 2, "[E, H]");
  size_is(w, 1, x.size(1), "[E, H] for hidden_states [T, H]");
  floating(x);
  floating(w);
  same_device(w, x);
  if (has(bias)) {
    const Arg b{*bias, "bias"};
    dims(b, 1, "[E]");
    size_is(b, 0, w.size(0), "[E] for weight [E, H]");
    floating(b);
    same_device(b, x);
  }
}

void check_router_logits_backward(const Tensor& grad_logits, const Tensor& hidden_states, const Tensor& weight) {
  check_router_logits(hidden_states, weight, std::nullopt);
  const Arg g{grad_logits, "grad_logits"};
  dims(g, 2, "[T, E]");
  size_is(g, 0, hidden_states.sym_size(0), "[T, E]");
  size_is(g, 1, weight.sym_size(0), "[T, E]");
  floating(g);
  same_device(g, {hidden_states, "hidden_states"});
}

void check_route(const Tensor& logits, int64_t top_k, const OptionalTensor& expert_bias,
                 const OptionalTensor& selection_scores, const OptionalTensor& topk_ids,
                 std::string_view score_function, double renormalize_epsilon, double scaling_factor, int64_t num_groups,
                 int64_t topk_groups, std::string_view group_score) {
  const Arg l{logits, "logits"};
  dims(l, 2, "[T, E]");
  floating(l);
  const auto experts = l.size(1);
  at_least(experts, 1, "the number of experts");
  if (auto e = experts.maybe_as_int()) {
    TORCH_CHECK_VALUE(*e <= kMaxExperts, "the number of experts must be at most ", kMaxExperts, ", got ", *e);
    TORCH_CHECK_VALUE(1 <= top_k && top_k <= *e, "top_k must be between 1 and the number of experts ", *e, ", got ",
                      top_k);
    TORCH_CHECK_VALUE(num_groups >= 1 && *e % num_groups == 0, "num_groups must divide the number of experts ", *e,
                      ", got ", num_groups);
    TORCH_CHECK_VALUE(1 <= topk_groups && topk_groups <= num_groups, "topk_groups must be between 1 and num_groups ",
                      num_groups, ", got ", topk_groups);
    TORCH_CHECK_VALUE(num_groups == 1 || topk_groups * (*e / num_groups) >= top_k, "topk_groups ", topk_groups, " of ",
                      num_groups, " groups leave ", topk_groups * (*e / num_groups),
                      " experts to choose from, and top_k must not exceed them, got ", top_k);
  }
  TORCH_CHECK_VALUE(renormalize_epsilon >= 0, "renormalize_epsilon must not be negative, got ", renormalize_epsilon);
  TORCH_CHECK_VALUE(scaling_factor == scaling_factor, "scaling_factor must be a number, got NaN");
  parse_score_function(score_function);
  parse_group_score(group_score);
  if (has(expert_bias)) {
    const Arg b{*expert_bias, "expert_bias"};
    dims(b, 1, "[E]");
    size_is(b, 0, experts, "[E] for logits [T, E]");
    floating(b);
    same_device(b, l);
  }
  if (has(selection_scores)) {
    const Arg s{*selection_scores, "selection_scores"};
    dims(s, 2, "[T, E]");
    size_is(s, 0, l.size(0), "[T, E] as logits");
    size_is(s, 1, experts, "[T, E] as logits");
    floating(s);
    same_device(s, l);
  }
  if (has(topk_ids)) {
    const Arg i{*topk_ids, "topk_ids"};
    dims(i, 2, "[T, K]");
    size_is(i, 0, l.size(0), "[T, K] for logits [T, E]");
    size_is(i, 1, top_k, "[T, K] with K = top_k");
    index_type(i);
    same_device(i, l);
  }
}

void check_route_backward(const OptionalTensor& grad_topk_weights, const OptionalTensor& grad_scores,
                          const Tensor& logits, const Tensor& topk_ids, std::string_view score_function) {
  const Arg l{logits, "logits"}, i{topk_ids, "topk_ids"};
  dims(l, 2, "[T, E]");
  floating(l);
  dims(i, 2, "[T, K]");
  size_is(i, 0, l.size(0), "[T, K] for logits [T, E]");
  index_type(i);
  same_device(i, l);
  if (has(grad_topk_weights)) {
    const Arg g{*grad_topk_weights, "grad_topk_weights"};
    dims(g, 2, "[T, K]");
    for (int64_t d = 0; d < 2; ++d) size_is(g, d, i.size(d), "[T, K] as topk_ids");
    same_device(g, l);
  }
  if (has(grad_scores)) {
    const Arg g{*grad_scores, "grad_scores"};
    dims(g, 2, "[T, E]");
    for (int64_t d = 0; d < 2; ++d) size_is(g, d, l.size(d), "[T, E] as logits");
    same_device(g, l);
  }
  parse_score_function(score_function);
}

void check_sinkhorn(const Tensor& logits, int64_t iterations, double tolerance) {
  const Arg l{logits, "logits"};
  dims(l, 2, "[T, E]");
  floating(l);
  TORCH_CHECK_VALUE(iterations >= 0, "iterations must not be negative (0 runs to the tolerance), got ", iterations);
  TORCH_CHECK_VALUE(iterations > 0 || tolerance > 0, "tolerance must be positive, got ", tolerance);
}

Tensor router_logits(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias) {
  return FASTMOE_OP(router_logits).call(hidden_states, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> router_logits_backward(const Tensor& grad_logits, const Tensor& hidden_states,
                                                          const Tensor& weight, std::array<bool, 3> output_mask) {
  return FASTMOE_OP(router_logits_backward).call(grad_logits, hidden_states, weight, output_mask);
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, int64_t top_k, const OptionalTensor& expert_bias,
                                         const OptionalTensor& selection_scores, const OptionalTensor& topk_ids,
                                         std::string_view score_function, bool scores_after_topk, bool renormalize,
                                         double renormalize_epsilon, double scaling_factor, int64_t num_groups,
                                         int64_t topk_groups, std::string_view group_score) {
  return FASTMOE_OP(route).call(logits, top_k, expert_bias, selection_scores, topk_ids, score_function,
                                scores_after_topk, renormalize, renormalize_epsilon, scaling_factor, num_groups,
                                topk_groups, group_score);
}

Tensor route_backward(const OptionalTensor& grad_topk_weights, const OptionalTensor& grad_scores, const Tensor& logits,
                      const Tensor& topk_ids, std::string_view score_function, bool scores_after_topk, bool renormalize,
                      double renormalize_epsilon, double scaling_factor) {
  return FASTMOE_OP(route_backward)
      .call(grad_topk_weights, grad_scores, logits, topk_ids, score_function, scores_after_topk, renormalize,
            renormalize_epsilon, scaling_factor);
}

Tensor sinkhorn(const Tensor& logits, int64_t iterations, double tolerance) {
  return FASTMOE_OP(sinkhorn).call(logits, iterations, tolerance);
}

}  // namespace fastmoe_cpp
