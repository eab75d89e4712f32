#include <ATen/ATen.h>
#include <torch/library.h>

#include "../ops/checks.h"
#include "../ops/dispatch.h"

namespace fastmoe_cpp::meta {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch(const Tensor& topk_ids, int64_t num_experts,
                                                    const OptionalTensor& topk_weights,
                                                    std::optional<c10::SymInt> capacity, std::string_view drop_policy,
                                                    const OptionalTensor& padding_mask) {
  check_dispatch(topk_ids, num_experts, topk_weights, capacity, drop_policy, padding_mask);
  const auto options = topk_ids.options().dtype(at::kInt);
  return {at::empty_symint({topk_ids.sym_size(0) * topk_ids.sym_size(1)}, options),
          at::empty_symint(topk_ids.sym_sizes(), options), at::empty({num_experts + 1}, options),
          at::empty({num_experts}, options.dtype(at::kLong))};
}

Tensor gather(const Tensor& hidden_states, const Tensor& slot_index, const Tensor& token_slot,
              const Tensor& expert_offsets) {
  check_gather(hidden_states, slot_index, token_slot, expert_offsets);
  return at::empty_symint({slot_index.sym_size(0), hidden_states.sym_size(1)}, hidden_states.options());
}

Tensor gather_backward(const Tensor& grad_rows, const Tensor& token_slot) {
  check_gather_backward(grad_rows, token_slot);
  return at::empty_symint({token_slot.sym_size(0), grad_rows.sym_size(1)}, grad_rows.options());
}

}  // namespace
}  // namespace fastmoe_cpp::meta

TORCH_LIBRARY_IMPL(fastmoe_cpp, Meta, m) {
  using namespace fastmoe_cpp::meta;
  m.impl("dispatch", dispatch);
  m.impl("route_and_dispatch", fastmoe_cpp::route_then_dispatch);
  m.impl("gather", gather);
  m.impl("gather_backward", gather_backward);
}
