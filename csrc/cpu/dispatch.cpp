#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "../ops/checks.h"
#include "../ops/dispatch.h"
#include "combine.h"
#include "memory.h"
#include "parallel.h"
#include "types.h"

namespace fastmoe_cpp::cpu {
namespace {

// Pairs are counted in parts of this many, so that long inputs are sorted by all threads and in one order.
constexpr int64_t kPart = 16384;

// Keeps, of the pairs first .. last of one expert (in pair order), the `capacity` with the largest weights; of equal
// weights the earlier pair, and NaN last. The kept ones stay in pair order.
template <typename T>
void keep_heaviest(int32_t* first, int32_t* last, int64_t capacity, const T* weights) {
  std::nth_element(first, first + capacity, last, [&](int32_t a, int32_t b) {
    const T x = weights[a], y = weights[b];
    const bool x_nan = x != x, y_nan = y != y;
    if (x_nan != y_nan) return y_nan;
    return x > y || (!(x < y) && a < b);
  });
  std::sort(first, first + capacity);
}

template <typename Id>
std::tuple<Tensor, Tensor, Tensor, Tensor> plan_of(const Tensor& topk_ids, int64_t experts, const Tensor& weights,
                                                   std::optional<int64_t> capacity, bool by_weight,
                                                   const Tensor& padding) {
  const int64_t tokens = topk_ids.size(0), top_k = topk_ids.size(1), pairs = tokens * top_k;
  const auto options = topk_ids.options().dtype(at::kInt);
  Tensor slot_index = at::empty({pairs}, options), token_slot = at::empty({tokens, top_k}, options);
  Tensor expert_offsets = at::empty({experts + 1}, options);
  Tensor tokens_per_expert = at::empty({experts}, options.dtype(at::kLong));
  const Id* ids = topk_ids.const_data_ptr<Id>();
  const bool* skip = pointer_or_null<const bool>(padding);
  auto* slots = slot_index.mutable_data_ptr<int32_t>();
  auto* slot_of = token_slot.mutable_data_ptr<int32_t>();
  auto* offsets = expert_offsets.mutable_data_ptr<int32_t>();
  auto* asked = tokens_per_expert.mutable_data_ptr<int64_t>();

  // counts of every part, then the place where each part's first pair of each expert goes
  const int64_t parts = (pairs + kPart - 1) / kPart;
  std::vector<int32_t> place(parts * experts, 0);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      int32_t* count = place.data() + part * experts;
      for (int64_t i = part * kPart; i < std::min(pairs, (part + 1) * kPart); ++i) {
        const int64_t id = ids[i];
        TORCH_CHECK_VALUE(id >= -1 && id < experts, "topk_ids must be -1 or between 0 and ", experts - 1, ", got ", id,
                          " for token ", i / top_k);
        if (id >= 0 && !(skip && skip[i / top_k])) ++count[id];
      }
    }
  });
  std::vector<int64_t> start(experts + 1, 0);
  for (int64_t e = 0; e < experts; ++e) {
    int64_t at = start[e];
    for (int64_t part = 0; part < parts; ++part) {
      const int32_t count = place[part * experts + e];
      place[part * experts + e] = static_cast<int32_t>(at);
      at += count;
    }
    start[e + 1] = at;
    asked[e] = at - start[e];
  }
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      int32_t* next = place.data() + part * experts;
      for (int64_t i = part * kPart; i < std::min(pairs, (part + 1) * kPart); ++i) {
        slot_of[i] = -1;
        if (ids[i] < 0 || (skip && skip[i / top_k])) continue;
        const int32_t slot = next[ids[i]]++;
        slots[slot] = static_cast<int32_t>(i);
        slot_of[i] = slot;
      }
    }
  });
  int64_t served = start[experts];
  if (!capacity || *std::max_element(asked, asked + experts) <= *capacity) {
    std::copy(start.begin(), start.end(), offsets);
  } else {
    std::fill(slot_of, slot_of + pairs, -1);
    served = 0;
    for (int64_t e = 0; e < experts; ++e) {
      offsets[e] = static_cast<int32_t>(served);
      int32_t* mine = slots + start[e];
      const int64_t kept = std::min(asked[e], *capacity);
      if (kept < asked[e] && kept > 0 && by_weight) {
        with_floating(weights.scalar_type(), [&](auto zero) {
          keep_heaviest(mine, mine + asked[e], kept, weights.const_data_ptr<decltype(zero)>());
        });
      }
      for (int64_t i = 0; i < kept; ++i, ++served) {
        slots[served] = mine[i];
        slot_of[mine[i]] = static_cast<int32_t>(served);
      }
    }
    offsets[experts] = static_cast<int32_t>(served);
  }
  std::fill(slots + served, slots + pairs, -1);
  return {slot_index, token_slot, expert_offsets, tokens_per_expert};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch(const Tensor& topk_ids, int64_t num_experts,
                                                    const OptionalTensor& topk_weights,
                                                    std::optional<c10::SymInt> capacity, std::string_view drop_policy,
                                                    const OptionalTensor& padding_mask) {
  check_dispatch(topk_ids, num_experts, topk_weights, capacity, drop_policy, padding_mask);
  const bool by_weight = parse_drop_policy(drop_policy) == DropPolicy::Probs;
  const Tensor ids = topk_ids.contiguous(), weights = has(topk_weights) ? topk_weights->contiguous() : Tensor();
  const Tensor padding = has(padding_mask) ? padding_mask->contiguous() : Tensor();
  std::optional<int64_t> limit;
  if (capacity) limit = capacity->expect_int();
  return ids.scalar_type() == at::kInt ? plan_of<int32_t>(ids, num_experts, weights, limit, by_weight, padding)
                                       : plan_of<int64_t>(ids, num_experts, weights, limit, by_weight, padding);
}

Tensor gather(const Tensor& hidden_states, const Tensor& slot_index, const Tensor& token_slot,
              const Tensor& expert_offsets) {
  check_gather(hidden_states, slot_index, token_slot, expert_offsets);
  const auto plan = read_plan(slot_index, token_slot, expert_offsets);
  const Tensor x = hidden_states.contiguous();
  Tensor rows = empty({plan.slots, x.size(1)}, x.options());
  const int64_t bytes = x.size(1) * x.element_size();
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(rows.mutable_data_ptr());
  for_rows(plan.slots, x.size(1), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      if (s < plan.served)
        std::memcpy(to + s * bytes, from + plan.token(s) * bytes, bytes);
      else
        std::memset(to + s * bytes, 0, bytes);
    }
  });
  return rows;
}

Tensor gather_backward(const Tensor& grad_rows, const Tensor& token_slot_) {
  check_gather_backward(grad_rows, token_slot_);
  const Tensor rows = grad_rows.contiguous(), token_slot = token_slot_.contiguous();
  check_token_slot(token_slot, rows.size(0));
  Tensor grad = empty({token_slot.size(0), rows.size(1)}, rows.options());
  with_floating(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    combine_rows<T>(token_slot.size(0), token_slot.size(1), rows.size(1), rows.const_data_ptr<T>(),
                    token_slot.const_data_ptr<int32_t>(), static_cast<const acc_t<T>*>(nullptr),
                    grad.mutable_data_ptr<T>());
  });
  return grad;
}

}  // namespace
}  // namespace fastmoe_cpp::cpu

TORCH_LIBRARY_IMPL(fastmoe_cpp, CPU, m) {
  using namespace fastmoe_cpp::cpu;
  m.impl("dispatch", dispatch);
  m.impl("route_and_dispatch", fastmoe_cpp::route_then_dispatch);
  m.impl("gather", gather);
  m.impl("gather_backward", gather_backward);
}
