#include "../../ops/dispatch.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "../router.h"
#include "launch.h"
#include "router_params.h"

namespace fastmoe_cpp::cuda {
namespace {

RoutedTokens route_and_dispatch_op(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias,
                                   int64_t top_k, const OptionalTensor& expert_bias, std::string_view score_function,
                                   bool scores_after_topk, bool renormalize, double renormalize_epsilon,
                                   double scaling_factor, int64_t num_groups, int64_t topk_groups,
                                   std::string_view group_score) {
  const auto by_three = [&] {
    return route_then_dispatch(hidden_states, weight, bias, top_k, expert_bias, score_function, scores_after_topk,
                               renormalize, renormalize_epsilon, scaling_factor, num_groups, topk_groups, group_score);
  };
  if (hidden_states.dim() != 2 || hidden_states.size(0) > kMaxFewTokens) return by_three();
  check_router_logits(hidden_states, weight, bias);
  const int64_t tokens = hidden_states.size(0), experts = weight.size(0);
  const c10::cuda::CUDAGuard guard(hidden_states.device());
  const Tensor x = hidden_states.contiguous(), w = weight.contiguous();
  const Tensor row_bias = contiguous_as(bias, at::kFloat), choice_bias = contiguous_as(expert_bias, at::kFloat);
  const at::Device device = x.device();
  const Tensor logits = empty({tokens, experts}, at::kFloat, device);
  check_route(logits, top_k, expert_bias, std::nullopt, std::nullopt, score_function, renormalize_epsilon,
              scaling_factor, num_groups, topk_groups, group_score);
  RouteFewParams p{};
  p.logits = few_logits(x, w, row_bias, logits);
  p.route.dtype = DType::f32;
  p.route.tokens = tokens;
  p.route.experts = static_cast<int>(experts);
  p.route.top_k = static_cast<int>(top_k);
  p.route.logits = p.logits.logits;
  p.route.expert_bias = data_or_null(choice_bias);
  p.route.weighting = weighting(score_function, scores_after_topk, renormalize, renormalize_epsilon, scaling_factor);
  p.route.num_groups = static_cast<int>(num_groups);
  p.route.topk_groups = static_cast<int>(topk_groups);
  p.route.group_rank = static_cast<GroupRank>(parse_group_score(group_score));
  bool taken;
  C10_CUDA_CHECK(takes_route_few(p, &taken));
  if (!taken) return by_three();
  const Tensor weights = empty({tokens, top_k}, at::kFloat, device), scores = empty(logits.sizes(), at::kFloat, device);
  const Tensor ids = empty({tokens, top_k}, at::kLong, device), counts = empty({experts}, at::kLong, device);
  const Tensor slot_index = empty({tokens * top_k}, at::kInt, device);
  const Tensor token_slot = empty({tokens, top_k}, at::kInt, device), offsets = empty({experts + 1}, at::kInt, device);
  p.route.topk_weights = weights.mutable_data_ptr();
  p.route.topk_ids = ids.mutable_data_ptr<int64_t>();
  p.route.scores = scores.mutable_data_ptr();
  p.slot_index = slot_index.mutable_data_ptr<int32_t>();
  p.token_slot = token_slot.mutable_data_ptr<int32_t>();
  p.expert_offsets = offsets.mutable_data_ptr<int32_t>();
  p.tokens_per_expert = counts.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(route_few(p, c10::cuda::getCurrentCUDAStream()));
  return {logits, weights, ids, scores, slot_index, token_slot, offsets, counts};
}

}  // namespace
}  // namespace fastmoe_cpp::cuda

TORCH_LIBRARY_IMPL(fastmoe_cpp, CUDA, m) { m.impl("route_and_dispatch", fastmoe_cpp::cuda::route_and_dispatch_op); }
