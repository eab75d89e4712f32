#include "combine.h"

#include <ATen/Dispatch.h>
#include <ATen/Dispatch_v2.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../ops/checks.h"
#include "memory.h"
#include "parallel.h"
#include "types.h"
#include "vector/kernels.h"

namespace fastmoe_cpp::cpu {

template <typename T, typename A>
void combine_rows(int64_t tokens, int64_t top_k, int64_t hidden, const T* rows, const int32_t* token_slot,
                  const A* weights, T* out) {
  const auto& k = kernels<T>();
  for_rows(tokens, hidden * (top_k + 1), [&](int64_t begin, int64_t end) {
    std::vector<const T*> sources(top_k);
    std::vector<A> scales(top_k);
    for (int64_t t = begin; t < end; ++t) {
      int64_t count = 0;
      for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
        if (token_slot[i] < 0) continue;
        sources[count] = rows + int64_t(token_slot[i]) * hidden;
        scales[count++] = weights ? weights[i] : A(1);
      }
      k.weighted_sum(hidden, count, sources.data(), scales.data(), out + t * hidden);
    }
  });
}
#define INSTANTIATE(T) \
  template void combine_rows(int64_t, int64_t, int64_t, const T*, const int32_t*, const acc_t<T>*, T*);
FASTMOE_FOR_FLOATING(INSTANTIATE)
#undef INSTANTIATE

namespace {

Tensor combine(const Tensor& rows_, const OptionalTensor& topk_weights, const Tensor& slot_index,
               const Tensor& token_slot, const Tensor& expert_offsets) {
  check_combine(rows_, topk_weights, slot_index, token_slot, expert_offsets);
  const auto plan = read_plan(slot_index, token_slot, expert_offsets);
  const Tensor rows = rows_.contiguous(), weights = has(topk_weights) ? topk_weights->contiguous() : Tensor();
  Tensor out = empty({plan.tokens, rows.size(1)}, rows.options());
  with_floating(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    combine_rows<T>(plan.tokens, plan.top_k, rows.size(1), rows.const_data_ptr<T>(), plan.token_slot,
                    pointer_or_null<const acc_t<T>>(weights), out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_output, const Tensor& rows_,
                                            const OptionalTensor& topk_weights, const Tensor& slot_index,
                                            const Tensor& token_slot, const Tensor& expert_offsets,
                                            std::array<bool, 2> output_mask) {
  check_combine_backward(grad_output, rows_, topk_weights, slot_index, token_slot, expert_offsets);
  const auto plan = read_plan(slot_index, token_slot, expert_offsets);
  const Tensor rows = rows_.contiguous(), grad = grad_output.contiguous();
  const Tensor weights = has(topk_weights) ? topk_weights->contiguous() : Tensor();
  const int64_t hidden = rows.size(1);
  const auto options = rows.options();
  Tensor grad_rows = at::empty({0}, options);
  Tensor grad_weights = at::empty({0}, options.dtype(accumulate_type(rows.scalar_type())));
  with_floating(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const auto& k = kernels<T>();
    const T* g = grad.const_data_ptr<T>();
    if (output_mask[0]) {
      grad_rows = empty(rows.sizes(), options);
      const A* w = pointer_or_null<const A>(weights);
      T* out = grad_rows.mutable_data_ptr<T>();
      for_rows(plan.slots, hidden * 2, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          const bool served = s < plan.served;
          const T* source = served ? g + plan.token(s) * hidden : g;
          const A scale = served && w ? w[plan.slot_index[s]] : A(1);
          k.weighted_sum(hidden, served, &source, &scale, out + s * hidden);
        }
      });
    }
    if (output_mask[1]) {
      grad_weights = at::empty({plan.tokens, plan.top_k}, grad_weights.options());
      const T* r = rows.const_data_ptr<T>();
      A* out = grad_weights.mutable_data_ptr<A>();
      for_rows(plan.pairs(), hidden * 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t slot = plan.token_slot[i];
          out[i] = slot < 0 ? A(0) : k.dot(hidden, g + i / plan.top_k * hidden, r + slot * hidden);
        }
      });
    }
  });
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace fastmoe_cpp::cpu

TORCH_LIBRARY_IMPL(fastmoe_cpp, CPU, m) {
  using namespace fastmoe_cpp::cpu;
  m.impl("combine", combine);
  m.impl("combine_backward", combine_backward);
}
