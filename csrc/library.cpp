// Every operator of the extension, on one screen. Symbols in the shape contracts:
//   T tokens, H hidden size, I expert intermediate size, E experts, K experts a token, P slots (T*K as dispatch
//   makes them, or fewer where the caller knows that a plan serves at most P pairs and cuts slot_index), S sequences.
// A plan is (slot_index [P], token_slot [T, K], expert_offsets [E + 1]), all int32:
//   expert e owns slots expert_offsets[e] .. expert_offsets[e + 1]; slot s serves pair slot_index[s] = t*K + k;
//   token_slot[t, k] is that slot, or -1 where the pair is dropped. Slots past expert_offsets[E] belong to nobody.
#include <torch/library.h>

TORCH_LIBRARY(fastmoe_cpp, m) {
  // router: hidden states -> logits -> K weights and K expert ids a token
  m.def("router_logits(Tensor hidden_states, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "router_logits_backward(Tensor grad_logits, Tensor hidden_states, Tensor weight, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "route(Tensor logits, int top_k, *, Tensor? expert_bias=None, Tensor? selection_scores=None, Tensor? topk_ids=None, "
      "str score_function='softmax', bool scores_after_topk=False, bool renormalize=True, float renormalize_epsilon=0.0, "
      "float scaling_factor=1.0, int num_groups=1, int topk_groups=1, str group_score='max') "
      "-> (Tensor topk_weights, Tensor topk_ids, Tensor scores)");
  m.def(
      "route_backward(Tensor? grad_topk_weights, Tensor? grad_scores, Tensor logits, Tensor topk_ids, str score_function, "
      "bool scores_after_topk, bool renormalize, float renormalize_epsilon, float scaling_factor) -> Tensor");
  m.def("sinkhorn(Tensor logits, int iterations=0, float tolerance=1e-4) -> Tensor");

  // dispatch: ids -> the plan, and the number of pairs that asked for each expert before any was dropped
  m.def(
      "dispatch(Tensor topk_ids, int num_experts, *, Tensor? topk_weights=None, SymInt? capacity=None, "
      "str drop_policy='position', Tensor? padding_mask=None) "
      "-> (Tensor slot_index, Tensor token_slot, Tensor expert_offsets, Tensor tokens_per_expert)");
  // router_logits, route and dispatch (without capacity or padding) in one call
  m.def(
      "route_and_dispatch(Tensor hidden_states, Tensor weight, Tensor? bias, int top_k, *, Tensor? expert_bias=None, "
      "str score_function='softmax', bool scores_after_topk=False, bool renormalize=True, float renormalize_epsilon=0.0, "
      "float scaling_factor=1.0, int num_groups=1, int topk_groups=1, str group_score='max') "
      "-> (Tensor logits, Tensor topk_weights, Tensor topk_ids, Tensor scores, Tensor slot_index, Tensor token_slot, "
      "Tensor expert_offsets, Tensor tokens_per_expert)");
  m.def("gather(Tensor hidden_states, Tensor slot_index, Tensor token_slot, Tensor expert_offsets) -> Tensor");
  m.def("gather_backward(Tensor grad_rows, Tensor token_slot) -> Tensor");

  // experts: the grouped MLP over the plan, summed into tokens; keeps X, the pre-activation and the plan for backward
  m.def(
      "experts(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor slot_index, "
      "Tensor token_slot, Tensor expert_offsets, *, Tensor? gate_up_bias=None, Tensor? down_bias=None, "
      "str activation='swiglu', float activation_alpha=1.702, float activation_limit=7.0, bool interleaved=False, "
      "bool weight_on_input=False, bool recompute=False) -> Tensor");
  m.def(
      "experts_forward(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, Tensor slot_index, "
      "Tensor token_slot, Tensor expert_offsets, Tensor? gate_up_bias, Tensor? down_bias, str activation, "
      "float activation_alpha, float activation_limit, bool interleaved, bool weight_on_input, bool keep_pre_activation) "
      "-> (Tensor output, Tensor pre_activation)");
  m.def(
      "experts_backward(Tensor grad_output, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_weights, "
      "Tensor slot_index, Tensor token_slot, Tensor expert_offsets, Tensor? gate_up_bias, Tensor? down_bias, "
      "Tensor? pre_activation, str activation, float activation_alpha, float activation_limit, bool interleaved, "
      "bool weight_on_input, bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // as experts_backward, but the gradient of a weight that has a main_grad is added to it and returned empty; workspace
  // is memory of pre_activation's shape, or pre_activation itself, whose content is lost
  m.def(
      "experts_backward_accumulate(Tensor grad_output, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, "
      "Tensor topk_weights, Tensor slot_index, Tensor token_slot, Tensor expert_offsets, Tensor? gate_up_bias, "
      "Tensor? down_bias, Tensor? pre_activation, str activation, float activation_alpha, float activation_limit, "
      "bool interleaved, bool weight_on_input, bool[6] output_mask, Tensor(a!)? gate_up_main_grad, "
      "Tensor(b!)? down_main_grad, Tensor(c!)? workspace=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("grouped_linear(Tensor rows, Tensor weight, Tensor expert_offsets, Tensor? bias=None) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor grad_output, Tensor rows, Tensor weight, Tensor expert_offsets, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  // combine: every token gathers its K rows and sums them by weight, in order of k
  m.def(
      "combine(Tensor rows, Tensor? topk_weights, Tensor slot_index, Tensor token_slot, Tensor expert_offsets) -> Tensor");
  m.def(
      "combine_backward(Tensor grad_output, Tensor rows, Tensor? topk_weights, Tensor slot_index, Tensor token_slot, "
      "Tensor expert_offsets, bool[2] output_mask) -> (Tensor, Tensor)");

  // exchange: rows between the ranks of a group, in rank order; one count a rank
  m.def(
      "exchange(Tensor rows, SymInt[] send_counts, SymInt[] recv_counts, str group_name, str operation='exchange', "
      "str caller='this rank') -> Tensor");

  // losses beside the router
  m.def("expert_counts(Tensor topk_ids, int num_experts, Tensor? padding_mask=None) -> Tensor");
  m.def("balance_loss(Tensor scores, Tensor tokens_per_expert, float scale, Tensor? padding_mask=None) -> Tensor");
  m.def(
      "balance_loss_backward(Tensor grad_loss, Tensor scores, Tensor tokens_per_expert, float scale, Tensor? padding_mask) -> Tensor");
  m.def("z_loss(Tensor logits, float scale=1.0, Tensor? padding_mask=None) -> Tensor");
  m.def("z_loss_backward(Tensor grad_loss, Tensor logits, float scale, Tensor? padding_mask) -> Tensor");
  m.def("update_expert_bias(Tensor(a!) expert_bias, Tensor tokens_per_expert, float rate, bool zero_mean=False) -> ()");
}
