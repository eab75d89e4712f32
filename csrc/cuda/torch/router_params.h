// The router's tensors and options in its launches' terms.
#pragma once
#include "../../ops/checks.h"
#include "../router.h"
#include "launch.h"

namespace fastmoe_cpp::cuda {

// Contiguous tensors; bias is float32 or undefined.
inline FewLogitsParams few_logits(const Tensor& hidden_states, const Tensor& weight, const Tensor& bias,
                                  const Tensor& logits) {
  return {dtype_of(hidden_states),
          dtype_of(weight),
          hidden_states.size(0),
          hidden_states.size(1),
          static_cast<int>(weight.size(0)),
          hidden_states.const_data_ptr(),
          weight.const_data_ptr(),
          static_cast<const float*>(data_or_null(bias)),
          logits.mutable_data_ptr<float>()};
}

inline Weighting weighting(std::string_view score_function, bool scores_after_topk, bool renormalize,
                           double renormalize_epsilon, double scaling_factor) {
  return {static_cast<Score>(parse_score_function(score_function)), scores_after_topk, renormalize, renormalize_epsilon,
          scaling_factor};
}
static_assert(static_cast<int>(Score::sigmoid) == static_cast<int>(ScoreFunction::Sigmoid) &&
              static_cast<int>(Score::sqrt_softplus) == static_cast<int>(ScoreFunction::SqrtSoftplus) &&
              static_cast<int>(GroupRank::top2_sum) == static_cast<int>(GroupScore::Top2Sum));

}  // namespace fastmoe_cpp::cuda
