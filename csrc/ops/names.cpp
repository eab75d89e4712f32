// The words a user passes for an activation or a policy, and the sentence for one that is not known.
#include <c10/util/Exception.h>

#include <iterator>
#include <string>

#include "checks.h"

namespace fastmoe_cpp {
namespace {

template <typename Names>
int64_t parse(std::string_view value, const char* argument, const Names& names) {
  std::string allowed;
  for (size_t i = 0; i < std::size(names); ++i) {
    if (names[i] == value) return static_cast<int64_t>(i);
    allowed += (i ? ", '" : "'") + std::string(names[i]) + "'";
  }
  TORCH_CHECK_VALUE(false, argument, " must be one of ", allowed, ", got '", std::string(value), "'");
}

constexpr std::string_view kScoreFunctions[] = {"softmax", "sigmoid", "sqrtsoftplus"};
constexpr std::string_view kGroupScores[] = {"max", "top2_sum"};
constexpr std::string_view kDropPolicies[] = {"position", "probs"};

}  // namespace

static_assert(std::size(kActivationNames) == static_cast<size_t>(Activation::Count));

Activation parse_activation(std::string_view name) {
  return static_cast<Activation>(parse(name, "activation", kActivationNames));
}
ScoreFunction parse_score_function(std::string_view name) {
  return static_cast<ScoreFunction>(parse(name, "score_function", kScoreFunctions));
}
GroupScore parse_group_score(std::string_view name) {
  return static_cast<GroupScore>(parse(name, "group_score", kGroupScores));
}
DropPolicy parse_drop_policy(std::string_view name) {
  return static_cast<DropPolicy>(parse(name, "drop_policy", kDropPolicies));
}

at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace fastmoe_cpp
