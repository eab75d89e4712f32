#include "../combine.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "launch.h"

namespace fastmoe_cpp::cuda {
namespace {

Tensor combine_op(const Tensor& rows, const OptionalTensor& topk_weights, const Tensor& slot_index,
                  const Tensor& token_slot, const Tensor& expert_offsets) {
  check_combine(rows, topk_weights, slot_index, token_slot, expert_offsets);
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor r = rows.contiguous(), w = contiguous_as(topk_weights, accumulate_type(rows.scalar_type()));
  const Tensor out = at::empty({token_slot.size(0), rows.size(1)}, rows.options());
  CombineParams p{};
  p.dtype = dtype_of(rows);
  p.tokens = token_slot.size(0);
  p.hidden = rows.size(1);
  p.top_k = static_cast<int>(token_slot.size(1));
  p.token_slot = token_slot.const_data_ptr<int32_t>();
  p.weights = data_or_null(w);
  p.rows = r.const_data_ptr();
  p.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(combine(p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::tuple<Tensor, Tensor> combine_backward_op(const Tensor& grad_output, const Tensor& rows,
                                               const OptionalTensor& topk_weights, const Tensor& slot_index,
                                               const Tensor& token_slot, const Tensor& expert_offsets,
                                               std::array<bool, 2> output_mask) {
  check_combine_backward(grad_output, rows, topk_weights, slot_index, token_slot, expert_offsets);
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto weight_options = rows.options().dtype(accumulate_type(rows.scalar_type()));
  const Tensor g = grad_output.contiguous(), r = rows.contiguous();
  const Tensor w = contiguous_as(topk_weights, accumulate_type(rows.scalar_type()));
  Tensor grad_rows = output_mask[0] ? at::empty(rows.sizes(), rows.options()) : at::empty({0}, rows.options());
  Tensor grad_weights = output_mask[1] ? at::empty(token_slot.sizes(), weight_options) : at::empty({0}, weight_options);
  CombineBackwardParams p{};
  p.dtype = dtype_of(rows);
  p.tokens = token_slot.size(0);
  p.hidden = rows.size(1);
  p.top_k = static_cast<int>(token_slot.size(1));
  p.experts = static_cast<int>(expert_offsets.size(0) - 1);
  p.slots = rows.size(0);
  p.token_slot = token_slot.const_data_ptr<int32_t>();
  p.expert_offsets = expert_offsets.const_data_ptr<int32_t>();
  p.weights = data_or_null(w);
  p.grad_output = g.const_data_ptr();
  p.rows = r.const_data_ptr();
  p.grad_rows = output_mask[0] ? grad_rows.mutable_data_ptr() : nullptr;
  p.grad_weights = output_mask[1] ? grad_weights.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(combine_backward(p, c10::cuda::getCurrentCUDAStream()));
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace fastmoe_cpp::cuda

TORCH_LIBRARY_IMPL(fastmoe_cpp, CUDA, m) {
  m.impl("combine", fastmoe_cpp::cuda::combine_op);
  m.impl("combine_backward", fastmoe_cpp::cuda::combine_backward_op);
}
