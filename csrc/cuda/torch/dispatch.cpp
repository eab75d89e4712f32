#include "../dispatch.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "../combine.h"
#include "launch.h"

namespace fastmoe_cpp::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_op(const Tensor& topk_ids, int64_t num_experts,
                                                       const OptionalTensor& topk_weights,
                                                       std::optional<c10::SymInt> capacity,
                                                       std::string_view drop_policy,
                                                       const OptionalTensor& padding_mask) {
  check_dispatch(topk_ids, num_experts, topk_weights, capacity, drop_policy, padding_mask);
  const c10::cuda::CUDAGuard guard(topk_ids.device());
  const auto new_ints = [&](at::IntArrayRef sizes) { return empty(sizes, at::kInt, topk_ids.device()); };
  const int64_t pairs = topk_ids.numel();
  int64_t blocks = 1;
  C10_CUDA_CHECK(dispatch_blocks(pairs, &blocks));
  const bool by_weight = capacity && parse_drop_policy(drop_policy) == DropPolicy::Probs;
  const Tensor ids = topk_ids.contiguous(), mask = contiguous_as(padding_mask, at::kBool);
  const Tensor weights =
      by_weight ? contiguous_as(topk_weights, accumulate_type(topk_weights->scalar_type())) : Tensor();
  const Tensor slot_index = new_ints({pairs}), token_slot = new_ints(ids.sizes()),
               offsets = new_ints({num_experts + 1});
  const Tensor tokens_per_expert = empty({num_experts}, at::kLong, topk_ids.device());
  const auto temporary = [&](bool wanted, int64_t size) { return wanted ? new_ints({size}) : Tensor(); };
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<int32_t>() : nullptr; };
  const Tensor block_counts = temporary(blocks > 1, blocks * num_experts);
  const Tensor pairs_by_expert = temporary(by_weight, pairs), uncapped = temporary(by_weight, num_experts + 1);
  DispatchParams p{};
  p.tokens = ids.size(0);
  p.top_k = static_cast<int>(ids.size(1));
  p.experts = static_cast<int>(num_experts);
  p.topk_ids = ids.const_data_ptr();
  p.wide_ids = ids.scalar_type() == at::kLong;
  p.padding_mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
  p.capacity = capacity ? capacity->guard_int(__FILE__, __LINE__) : -1;
  p.by_weight = by_weight;
  p.topk_weights = data_or_null(weights);
  p.wide_weights = by_weight && weights.scalar_type() == at::kDouble;
  p.slot_index = pointer(slot_index);
  p.token_slot = pointer(token_slot);
  p.expert_offsets = pointer(offsets);
  p.tokens_per_expert = tokens_per_expert.mutable_data_ptr<int64_t>();
  p.block_counts = pointer(block_counts);
  p.pairs_by_expert = pointer(pairs_by_expert);
  p.uncapped_offsets = pointer(uncapped);
  C10_CUDA_CHECK(dispatch(p, c10::cuda::getCurrentCUDAStream()));
  return {slot_index, token_slot, offsets, tokens_per_expert};
}

// The gather is the transposed combine with weights of one, and its backward the combine itself.
Tensor gather_op(const Tensor& hidden_states, const Tensor& slot_index, const Tensor& token_slot,
                 const Tensor& expert_offsets) {
  check_gather(hidden_states, slot_index, token_slot, expert_offsets);
  const c10::cuda::CUDAGuard guard(hidden_states.device());
  const Tensor x = hidden_states.contiguous();
  const Tensor rows = at::empty({slot_index.size(0), x.size(1)}, x.options());
  CombineBackwardParams p{};
  p.dtype = dtype_of(x);
  p.tokens = x.size(0);
  p.hidden = x.size(1);
  p.top_k = static_cast<int>(token_slot.size(1));
  p.experts = static_cast<int>(expert_offsets.size(0) - 1);
  p.slots = rows.size(0);
  p.token_slot = token_slot.const_data_ptr<int32_t>();
  p.expert_offsets = expert_offsets.const_data_ptr<int32_t>();
  p.grad_output = x.const_data_ptr();
  p.grad_rows = rows.mutable_data_ptr();
  C10_CUDA_CHECK(combine_backward(p, c10::cuda::getCurrentCUDAStream()));
  return rows;
}

Tensor gather_backward_op(const Tensor& grad_rows, const Tensor& token_slot) {
  check_gather_backward(grad_rows, token_slot);
  const c10::cuda::CUDAGuard guard(grad_rows.device());
  const Tensor rows = grad_rows.contiguous(), slots = token_slot.contiguous();
  const Tensor out = at::empty({slots.size(0), rows.size(1)}, rows.options());
  CombineParams p{};
  p.dtype = dtype_of(rows);
  p.tokens = slots.size(0);
  p.hidden = rows.size(1);
  p.top_k = static_cast<int>(slots.size(1));
  p.token_slot = slots.const_data_ptr<int32_t>();
  p.rows = rows.const_data_ptr();
  p.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(combine(p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace
}  // namespace fastmoe_cpp::cuda

TORCH_LIBRARY_IMPL(fastmoe_cpp, CUDA, m) {
  m.impl("dispatch", fastmoe_cpp::cuda::dispatch_op);
  m.impl("gather", fastmoe_cpp::cuda::gather_op);
  m.impl("gather_backward", fastmoe_cpp::cuda::gather_backward_op);
}
