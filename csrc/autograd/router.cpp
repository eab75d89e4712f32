#include "../ops/router.h"

#include "function.h"

namespace fastmoe_cpp::autograd {
namespace {

struct RouterLogits : torch::autograd::Function<RouterLogits> {
  static Tensor forward(AutogradContext* ctx, const Tensor& hidden_states, const Tensor& weight,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({hidden_states, weight});
    ctx->saved_data["has_bias"] = has(bias);
    if (has(bias)) ctx->saved_data["bias_type"] = bias->scalar_type();
    return router_logits(hidden_states, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const Wanted wanted(ctx, {true, true, has_bias});
    auto [hidden, weight, bias] =
        router_logits_backward(grads[0], saved[0], saved[1], {wanted(0), wanted(1), wanted(2)});
    if (wanted(2)) bias = bias.to(ctx->saved_data["bias_type"].toScalarType());
    return {grad_or_none(hidden, wanted(0)), grad_or_none(weight, wanted(1)), grad_or_none(bias, wanted(2))};
  }
};

Tensor router_logits_autograd(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias) {
  if (recording({&hidden_states, &weight, &or_undefined(bias)}))
    return RouterLogits::apply(hidden_states, weight, bias);
  at::AutoDispatchBelowADInplaceOrView guard;
  return router_logits(hidden_states, weight, bias);
}

// The ids are integers and so without gradient unmarked: a mark is what compiled autograd can't take of a Function in C++.
struct Route : torch::autograd::Function<Route> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, int64_t top_k,
                               const OptionalTensor& expert_bias, const OptionalTensor& selection_scores,
                               const OptionalTensor& topk_ids, std::string_view score_function, bool scores_after_topk,
                               bool renormalize, double renormalize_epsilon, double scaling_factor, int64_t num_groups,
                               int64_t topk_groups, std::string_view group_score) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, ids, scores] =
        route(logits, top_k, expert_bias, selection_scores, topk_ids, score_function, scores_after_topk, renormalize,
              renormalize_epsilon, scaling_factor, num_groups, topk_groups, group_score);
    ctx->save_for_backward({logits, ids});
    ctx->set_materialize_grads(false);
    ctx->saved_data["score_function"] = std::string(score_function);
    ctx->saved_data["scores_after_topk"] = scores_after_topk;
    ctx->saved_data["renormalize"] = renormalize;
    ctx->saved_data["renormalize_epsilon"] = renormalize_epsilon;
    ctx->saved_data["scaling_factor"] = scaling_factor;
    return {weights, ids, scores};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(13);
    const auto saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const std::string score_function = data["score_function"].toStringRef();
    if (grads[0].defined() || grads[2].defined())
      out[0] = route_backward(optional(grads[0]), optional(grads[2]), saved[0], saved[1], score_function,
                              data["scores_after_topk"].toBool(), data["renormalize"].toBool(),
                              data["renormalize_epsilon"].toDouble(), data["scaling_factor"].toDouble());
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor> route_autograd(const Tensor& logits, int64_t top_k,
                                                  const OptionalTensor& expert_bias,
                                                  const OptionalTensor& selection_scores,
                                                  const OptionalTensor& topk_ids, std::string_view score_function,
                                                  bool scores_after_topk, bool renormalize, double renormalize_epsilon,
                                                  double scaling_factor, int64_t num_groups, int64_t topk_groups,
                                                  std::string_view group_score) {
  if (recording({&logits})) {
    // Bias and selection scores choose experts; a gradient never flows to them.
    const auto detached = [](const OptionalTensor& t) { return has(t) ? OptionalTensor(t->detach()) : std::nullopt; };
    auto out = Route::apply(logits, top_k, detached(expert_bias), detached(selection_scores), topk_ids, score_function,
                            scores_after_topk, renormalize, renormalize_epsilon, scaling_factor, num_groups,
                            topk_groups, group_score);
    return {out[0], out[1], out[2]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return route(logits, top_k, expert_bias, selection_scores, topk_ids, score_function, scores_after_topk, renormalize,
               renormalize_epsilon, scaling_factor, num_groups, topk_groups, group_score);
}

}  // namespace
}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp, Autograd, m) {
  m.impl("router_logits", fastmoe_cpp::autograd::router_logits_autograd);
  m.impl("route", fastmoe_cpp::autograd::route_autograd);
}
