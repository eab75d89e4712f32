// Under autocast the expert projections run in the autocast dtype; everything else keeps its own types (the router is
// float32 by default and mixes operand types itself). One file for all stages: the rule is one rule.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "../ops/experts.h"

namespace fastmoe_cpp::autocast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

constexpr c10::DispatchKeySet kAutocastKeys({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA});

template <c10::DeviceType kDevice>
struct Cast {
  at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  c10::impl::ExcludeDispatchKeyGuard guard{kAutocastKeys};
  // float64 is somebody's explicit wish; autocast leaves it alone, as torch's own cast policy does.
  Tensor operator()(const Tensor& t) const { return at::autocast::cached_cast(type, t, kDevice); }
  OptionalTensor operator()(const OptionalTensor& t) const {
    return t && t->defined() ? OptionalTensor((*this)(*t)) : t;
  }
};

template <c10::DeviceType kDevice>
Tensor experts(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
               const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot,
               const Tensor& expert_offsets, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
               std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
               bool weight_on_input, bool recompute) {
  const Cast<kDevice> cast;
  return fastmoe_cpp::experts(cast(hidden_states), cast(gate_up_proj), cast(down_proj), topk_weights, slot_index,
                              token_slot, expert_offsets, cast(gate_up_bias), cast(down_bias), activation,
                              activation_alpha, activation_limit, interleaved, weight_on_input, recompute);
}

template <c10::DeviceType kDevice>
Tensor grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                      const OptionalTensor& bias) {
  const Cast<kDevice> cast;
  return fastmoe_cpp::grouped_linear(cast(rows), cast(weight), expert_offsets, cast(bias));
}

// A kernel may call torch's own products; they must see the types they were given.
void keep_types(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard guard(kAutocastKeys);
  op.callBoxed(stack);
}

constexpr const char* kKeepTypes[] = {"router_logits",
                                      "router_logits_backward",
                                      "route",
                                      "route_backward",
                                      "sinkhorn",
                                      "dispatch",
                                      "route_and_dispatch",
                                      "gather",
                                      "gather_backward",
                                      "experts_forward",
                                      "experts_backward",
                                      "experts_backward_accumulate",
                                      "grouped_linear_backward",
                                      "combine",
                                      "combine_backward",
                                      "exchange",
                                      "expert_counts",
                                      "balance_loss",
                                      "balance_loss_backward",
                                      "z_loss",
                                      "z_loss_backward",
                                      "update_expert_bias"};

template <c10::DeviceType kDevice>
void implement(torch::Library& m) {
  m.impl("experts", experts<kDevice>);
  m.impl("grouped_linear", grouped_linear<kDevice>);
  for (const char* name : kKeepTypes) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&keep_types>());
}

}  // namespace
}  // namespace fastmoe_cpp::autocast

TORCH_LIBRARY_IMPL(fastmoe_cpp, AutocastCPU, m) { fastmoe_cpp::autocast::implement<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(fastmoe_cpp, AutocastCUDA, m) { fastmoe_cpp::autocast::implement<c10::DeviceType::CUDA>(m); }
