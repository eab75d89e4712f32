#include "options.h"

#include <algorithm>
#include <cmath>

#include "../ops/checks.h"

namespace fastmoe_cpp {
namespace {

void at_least(const char* name, int64_t value, int64_t low) {
  TORCH_CHECK_VALUE(value >= low, name, " must be an integer of at least ", low, ", got ", value);
}

void number(const char* name, double value, bool zero_allowed) {
  TORCH_CHECK_VALUE(std::isfinite(value) && (value > 0 || (zero_allowed && value == 0)), name,
                    " must be a finite number ", zero_allowed ? "of at least 0" : "above 0", ", got ", value);
}

}  // namespace

bool MoEOptions::gated() const { return is_gated(parse_activation(activation_)); }

std::optional<int64_t> MoEOptions::capacity(int64_t tokens, bool training) const {
  const auto factor = training ? capacity_factor_ : eval_capacity_factor_;
  if (!factor) return std::nullopt;
  // 1.1 stands for eleven tenths: what rounding put above a whole number of tokens is taken off before the ceiling.
  // With a factor of 10**6 nothing is dropped, nor with a larger one, whose capacity may be no int64.
  const double share =
      std::min(*factor, 1e6) * static_cast<double>(tokens * top_k_) / static_cast<double>(num_experts_);
  return static_cast<int64_t>(std::ceil(share * (1 - 1e-12)));
}

void MoEOptions::check() const {
  at_least("hidden_size", hidden_size_, 1);
  at_least("intermediate_size", intermediate_size_, 1);
  TORCH_CHECK_VALUE(1 <= num_experts_ && num_experts_ <= kMaxExperts, "num_experts must be an integer between 1 and ",
                    kMaxExperts, ", got ", num_experts_);
  TORCH_CHECK_VALUE(1 <= top_k_ && top_k_ <= num_experts_, "top_k must be between 1 and num_experts = ", num_experts_,
                    ", got ", top_k_);
  parse_drop_policy(drop_policy_);
  number("activation_alpha", activation_alpha_, false);
  number("activation_limit", activation_limit_, false);
  number("initializer_range", initializer_range_, true);
  if (shared_intermediate_size_) at_least("shared_intermediate_size", *shared_intermediate_size_, 1);
  if (capacity_factor_) number("capacity_factor", *capacity_factor_, true);
  if (eval_capacity_factor_) number("eval_capacity_factor", *eval_capacity_factor_, true);
  TORCH_CHECK_VALUE(gated() || !interleaved_, "interleaved must be false for the ungated activation '", activation_,
                    "', got true");
  TORCH_CHECK_VALUE(shared_intermediate_size_ || !shared_expert_gate_,
                    "shared_expert_gate must be false where shared_intermediate_size is not set, got true");

  const auto& r = router_;
  parse_score_function(r.score_function());
  parse_group_score(r.group_score());
  number("router.renormalize_epsilon", r.renormalize_epsilon(), true);
  number("router.scaling_factor", r.scaling_factor(), false);
  number("router.expert_bias_update_rate", r.expert_bias_update_rate(), true);
  number("router.sinkhorn_tolerance", r.sinkhorn_tolerance(), false);
  number("router.balance_loss_coefficient", r.balance_loss_coefficient(), true);
  number("router.z_loss_coefficient", r.z_loss_coefficient(), true);
  at_least("router.sinkhorn_iterations", r.sinkhorn_iterations(), 0);
  TORCH_CHECK_VALUE(r.jitter_eps() >= 0 && r.jitter_eps() < 1,
                    "router.jitter_eps must be a number of at least 0 and below 1, got ", r.jitter_eps());
  TORCH_CHECK_VALUE(r.jitter_eps() > 0 || !r.jitter_experts(),
                    "router.jitter_experts must be false where jitter_eps is 0, got true");
  const auto type = r.dtype();
  TORCH_CHECK_VALUE(type == c10::kFloat || type == c10::kDouble || type == c10::kBFloat16 || type == c10::kHalf,
                    "router.dtype must be float32, float64, bfloat16 or float16, got ", type);
  at_least("router.num_groups", r.num_groups(), 1);
  TORCH_CHECK_VALUE(num_experts_ % r.num_groups() == 0, "router.num_groups must divide num_experts = ", num_experts_,
                    ", got ", r.num_groups());
  TORCH_CHECK_VALUE(1 <= r.topk_groups() && r.topk_groups() <= r.num_groups(),
                    "router.topk_groups must be between 1 and num_groups = ", r.num_groups(), ", got ",
                    r.topk_groups());
  const int64_t a_group = num_experts_ / r.num_groups();
  TORCH_CHECK_VALUE(top_k_ <= r.topk_groups() * a_group, "top_k must be at most ", r.topk_groups() * a_group,
                    ", the experts in topk_groups = ", r.topk_groups(), " groups of ", a_group, ", got ", top_k_);
  TORCH_CHECK_VALUE(r.num_groups() == 1 || r.group_score() != "top2_sum" || a_group >= 2,
                    "router.group_score must be 'max' for groups of one expert, got 'top2_sum'");
}

}  // namespace fastmoe_cpp
