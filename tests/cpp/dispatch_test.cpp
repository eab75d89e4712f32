// The plan against a naive one, and what it refuses.
#include <fastmoe_cpp/fastmoe_cpp.h>
#include <torch/torch.h>

#include <algorithm>
#include <random>

#include "test.h"

namespace {

struct NaivePlan {
  std::vector<int32_t> slot_index, token_slot, expert_offsets;
  std::vector<int64_t> tokens_per_expert;
};

// By the definition: walk the experts, and for each the pairs in order.
NaivePlan naive_plan(const std::vector<int64_t>& ids, int64_t top_k, int64_t experts, int64_t capacity,
                     const std::vector<float>& weights, bool by_weight, const std::vector<bool>& padding) {
  NaivePlan plan;
  plan.slot_index.assign(ids.size(), -1);
  plan.token_slot.assign(ids.size(), -1);
  plan.expert_offsets = {0};
  int32_t slot = 0;
  for (int64_t e = 0; e < experts; ++e) {
    std::vector<size_t> pairs;
    for (size_t p = 0; p < ids.size(); ++p)
      if (ids[p] == e && !padding[p / static_cast<size_t>(top_k)]) pairs.push_back(p);
    plan.tokens_per_expert.push_back(static_cast<int64_t>(pairs.size()));
    if (by_weight)
      std::stable_sort(pairs.begin(), pairs.end(), [&](size_t a, size_t b) { return weights[a] > weights[b]; });
    if (static_cast<int64_t>(pairs.size()) > capacity) pairs.resize(static_cast<size_t>(capacity));
    std::sort(pairs.begin(), pairs.end());
    for (size_t p : pairs) {
      plan.slot_index[static_cast<size_t>(slot)] = static_cast<int32_t>(p);
      plan.token_slot[p] = slot++;
    }
    plan.expert_offsets.push_back(slot);
  }
  return plan;
}

template <typename T>
std::vector<T> values(const torch::Tensor& t) {
  const auto flat = t.contiguous().reshape({-1});
  return {flat.data_ptr<T>(), flat.data_ptr<T>() + flat.numel()};
}

void compare(int64_t tokens, int64_t top_k, int64_t experts, std::optional<int64_t> capacity, bool by_weight,
             bool with_padding, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int64_t> ids;
  std::vector<float> weights;
  std::vector<bool> padding;
  for (int64_t t = 0; t < tokens; ++t) {
    padding.push_back(with_padding && random() % 4 == 0);
    for (int64_t k = 0; k < top_k; ++k) {
      // a few ids are -1, and weights come in steps, so that some are equal
      ids.push_back(random() % 8 == 0 ? -1 : static_cast<int64_t>(random() % static_cast<unsigned>(experts)));
      weights.push_back(static_cast<float>(random() % 5) / 4);
    }
  }
  const auto expected = naive_plan(ids, top_k, experts, capacity.value_or(tokens * top_k), weights, by_weight, padding);
  const auto topk_ids = torch::tensor(ids, torch::kLong).reshape({tokens, top_k});
  const auto topk_weights = torch::tensor(weights).reshape({tokens, top_k});
  auto mask = torch::zeros({tokens}, torch::kBool);
  for (int64_t t = 0; t < tokens; ++t) mask[t] = static_cast<bool>(padding[static_cast<size_t>(t)]);
  const auto [slot_index, token_slot, expert_offsets, counts] = fastmoe_cpp::dispatch(
      topk_ids, experts, topk_weights, capacity ? std::optional<c10::SymInt>(*capacity) : std::nullopt,
      by_weight ? "probs" : "position", with_padding ? std::optional(mask) : std::nullopt);
  CHECK(values<int32_t>(expert_offsets) == expected.expert_offsets);
  CHECK(values<int32_t>(token_slot) == expected.token_slot);
  CHECK(values<int64_t>(counts) == expected.tokens_per_expert);
  const auto served = static_cast<size_t>(expected.expert_offsets.back());
  const auto index = values<int32_t>(slot_index);
  CHECK(std::equal(index.begin(), index.begin() + static_cast<int64_t>(served), expected.slot_index.begin()));
}

}  // namespace

TEST(plan_equals_the_definition) {
  unsigned seed = 0;
  for (int64_t tokens : {0, 1, 7, 130})
    for (int64_t top_k : {1, 2, 5})
      for (int64_t experts : {1, 3, 8, 300}) compare(tokens, top_k, experts, std::nullopt, false, false, ++seed);
}

TEST(plan_with_capacity_keeps_the_first_or_the_heaviest) {
  unsigned seed = 100;
  for (int64_t capacity : {0, 1, 3, 1000})
    for (bool by_weight : {false, true}) compare(60, 3, 5, capacity, by_weight, false, ++seed);
}

TEST(plan_drops_padding_before_capacity) {
  unsigned seed = 200;
  for (bool by_weight : {false, true}) compare(80, 2, 4, 6, by_weight, true, ++seed);
}

TEST(plan_refuses_ids_out_of_range) {
  for (int64_t id : {-2, 4})
    CHECK_THROWS(c10::Error, fastmoe_cpp::dispatch(torch::full({3, 2}, id, torch::kLong), 4), "topk_ids",
                 std::to_string(id).c_str());
}

TEST(gather_and_combine_are_inverse_for_weights_that_sum_to_one) {
  torch::manual_seed(0);
  const auto ids = torch::randint(6, {40, 3}, torch::kLong), x = torch::randn({40, 16});
  const auto weights = torch::softmax(torch::randn({40, 3}), -1);
  const auto [slot_index, token_slot, expert_offsets, counts] = fastmoe_cpp::dispatch(ids, 6);
  const auto rows = fastmoe_cpp::gather(x, slot_index, token_slot, expert_offsets);
  CHECK_EQUAL(rows.size(0), 120);
  CHECK(torch::allclose(fastmoe_cpp::combine(rows, weights, slot_index, token_slot, expert_offsets), x, 1e-5, 1e-6));
}
