#include "dispatch.h"

#include <limits>

#include "checking.h"
#include "router.h"
#include "typed_call.h"

namespace fastmoe_cpp {
using namespace checking;

void check_dispatch(const Tensor& topk_ids, int64_t num_experts, const OptionalTensor& topk_weights,
                    const std::optional<c10::SymInt>& capacity, std::string_view drop_policy,
                    const OptionalTensor& padding_mask) {
  const Arg ids{topk_ids, "topk_ids"};
  dims(ids, 2, "[T, K]");
  index_type(ids);
  TORCH_CHECK_VALUE(1 <= num_experts && num_experts <= kMaxExperts, "num_experts must be between 1 and ", kMaxExperts,
                    ", got ", num_experts);
  const auto pairs = ids.size(0) * ids.size(1);
  if (auto known = pairs.maybe_as_int()) {
    TORCH_CHECK_VALUE(*known <= std::numeric_limits<int32_t>::max(),
                      "topk_ids must hold at most 2^31 - 1 pairs of token and expert, got ", topk_ids.sym_sizes());
  }
  if (capacity) at_least(*capacity, 0, "capacity");
  const auto policy = parse_drop_policy(drop_policy);
  TORCH_CHECK_VALUE(policy != DropPolicy::Probs || !capacity || has(topk_weights),
                    "drop_policy 'probs' must be given topk_weights, got None");
  if (has(topk_weights)) {
    const Arg w{*topk_weights, "topk_weights"};
    dims(w, 2, "[T, K]");
    for (int64_t d = 0; d < 2; ++d) size_is(w, d, ids.size(d), "[T, K] as topk_ids");
    floating(w);
    same_device(w, ids);
  }
  if (has(padding_mask)) {
    const Arg m{*padding_mask, "padding_mask"};
    dims(m, 1, "[T]");
    size_is(m, 0, ids.size(0), "[T] for topk_ids [T, K]");
    dtype_is(m, at::kBool, "True marks padding");
    same_device(m, ids);
  }
}

void check_gather(const Tensor& hidden_states, const Tensor& slot_index, const Tensor& token_slot,
                  const Tensor& expert_offsets) {
  const Arg x{hidden_states, "hidden_states"};
  dims(x, 2, "[T, H]");
  floating(x);
  plan({slot_index, "slot_index"}, {token_slot, "token_slot"}, {expert_offsets, "expert_offsets"}, x);
  size_is({token_slot, "token_slot"}, 0, x.size(0), "[T, K] for hidden_states [T, H]");
}

void check_gather_backward(const Tensor& grad_rows, const Tensor& token_slot) {
  const Arg g{grad_rows, "grad_rows"}, s{token_slot, "token_slot"};
  dims(g, 2, "[P, H]");
  floating(g);
  dims(s, 2, "[T, K]");
  dtype_is(s, at::kInt, "as dispatch returns it");
  number_of_slots(g.size(0), s, g.name);
  same_device(s, g);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch(const Tensor& topk_ids, int64_t num_experts,
                                                    const OptionalTensor& topk_weights,
                                                    std::optional<c10::SymInt> capacity, std::string_view drop_policy,
                                                    const OptionalTensor& padding_mask) {
  return FASTMOE_OP(dispatch).call(topk_ids, num_experts, topk_weights, std::move(capacity), drop_policy, padding_mask);
}

Tensor gather(const Tensor& hidden_states, const Tensor& slot_index, const Tensor& token_slot,
              const Tensor& expert_offsets) {
  return FASTMOE_OP(gather).call(hidden_states, slot_index, token_slot, expert_offsets);
}

Tensor gather_backward(const Tensor& grad_rows, const Tensor& token_slot) {
  return FASTMOE_OP(gather_backward).call(grad_rows, token_slot);
}

RoutedTokens route_and_dispatch(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias,
                                int64_t top_k, const OptionalTensor& expert_bias, std::string_view score_function,
                                bool scores_after_topk, bool renormalize, double renormalize_epsilon,
                                double scaling_factor, int64_t num_groups, int64_t topk_groups,
                                std::string_view group_score) {
  return FASTMOE_OP(route_and_dispatch)
      .call(hidden_states, weight, bias, top_k, expert_bias, score_function, scores_after_topk, renormalize,
            renormalize_epsilon, scaling_factor, num_groups, topk_groups, group_score);
}

RoutedTokens route_then_dispatch(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias,
                                 int64_t top_k, const OptionalTensor& expert_bias, std::string_view score_function,
                                 bool scores_after_topk, bool renormalize, double renormalize_epsilon,
                                 double scaling_factor, int64_t num_groups, int64_t topk_groups,
                                 std::string_view group_score) {
  Tensor logits = router_logits(hidden_states, weight, bias);
  auto [weights, ids, scores] =
      route(logits, top_k, expert_bias, std::nullopt, std::nullopt, score_function, scores_after_topk, renormalize,
            renormalize_epsilon, scaling_factor, num_groups, topk_groups, group_score);
  auto [slot_index, token_slot, offsets, counts] =
      dispatch(ids, weight.size(0), std::nullopt, std::nullopt, "position", std::nullopt);
  return {logits, weights, ids, scores, slot_index, token_slot, offsets, counts};
}

}  // namespace fastmoe_cpp
