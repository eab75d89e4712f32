#include "combine.h"

#include "checking.h"
#include "typed_call.h"

namespace fastmoe_cpp {
using namespace checking;

void check_combine(const Tensor& rows, const OptionalTensor& topk_weights, const Tensor& slot_index,
                   const Tensor& token_slot, const Tensor& expert_offsets) {
  const Arg r{rows, "rows"}, slots{token_slot, "token_slot"};
  dims(r, 2, "[P, H]");
  floating(r);
  plan({slot_index, "slot_index"}, slots, {expert_offsets, "expert_offsets"}, r);
  size_is(r, 0, slot_index.sym_size(0), "[P, H] for slot_index [P]");
  if (has(topk_weights)) {
    const Arg w{*topk_weights, "topk_weights"};
    dims(w, 2, "[T, K]");
    for (int64_t d = 0; d < 2; ++d) size_is(w, d, slots.size(d), "[T, K] as token_slot");
    dtype_is(w, accumulate_type(rows.scalar_type()), "what sums are kept in");
    same_device(w, r);
  }
}

void check_combine_backward(const Tensor& grad_output, const Tensor& rows, const OptionalTensor& topk_weights,
                            const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets) {
  check_combine(rows, topk_weights, slot_index, token_slot, expert_offsets);
  const Arg g{grad_output, "grad_output"};
  dims(g, 2, "[T, H]");
  size_is(g, 0, token_slot.sym_size(0), "[T, H] for token_slot [T, K]");
  size_is(g, 1, rows.sym_size(1), "[T, H] for rows [P, H]");
  dtype_is(g, rows.scalar_type(), "the dtype of rows");
  same_device(g, {rows, "rows"});
}

Tensor combine(const Tensor& rows, const OptionalTensor& topk_weights, const Tensor& slot_index,
               const Tensor& token_slot, const Tensor& expert_offsets) {
  return FASTMOE_OP(combine).call(rows, topk_weights, slot_index, token_slot, expert_offsets);
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_output, const Tensor& rows,
                                            const OptionalTensor& topk_weights, const Tensor& slot_index,
                                            const Tensor& token_slot, const Tensor& expert_offsets,
                                            std::array<bool, 2> output_mask) {
  return FASTMOE_OP(combine_backward)
      .call(grad_output, rows, topk_weights, slot_index, token_slot, expert_offsets, output_mask);
}

}  // namespace fastmoe_cpp
