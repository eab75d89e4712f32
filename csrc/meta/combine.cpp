#include <ATen/ATen.h>
#include <torch/library.h>

#include "../ops/checks.h"

namespace fastmoe_cpp::meta {
namespace {

Tensor combine(const Tensor& rows, const OptionalTensor& topk_weights, const Tensor& slot_index,
               const Tensor& token_slot, const Tensor& expert_offsets) {
  check_combine(rows, topk_weights, slot_index, token_slot, expert_offsets);
  return at::empty_symint({token_slot.sym_size(0), rows.sym_size(1)}, rows.options());
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_output, const Tensor& rows,
                                            const OptionalTensor& topk_weights, const Tensor& slot_index,
                                            const Tensor& token_slot, const Tensor& expert_offsets,
                                            std::array<bool, 2> output_mask) {
  check_combine_backward(grad_output, rows, topk_weights, slot_index, token_slot, expert_offsets);
  const auto weight_options = rows.options().dtype(accumulate_type(rows.scalar_type()));
  return {output_mask[0] ? at::empty_symint(rows.sym_sizes(), rows.options()) : at::empty({0}, rows.options()),
          output_mask[1] ? at::empty_symint(token_slot.sym_sizes(), weight_options) : at::empty({0}, weight_options)};
}

}  // namespace
}  // namespace fastmoe_cpp::meta

TORCH_LIBRARY_IMPL(fastmoe_cpp, Meta, m) {
  using namespace fastmoe_cpp::meta;
  m.impl("combine", combine);
  m.impl("combine_backward", combine_backward);
}
