// fastmoe_cpp._C: the autograd functions behind torch.ops.fastmoe_cpp by name, typed, for eager code and introspection.
// A call here breaks a compiled graph; modules go through torch.ops.
#include <torch/extension.h>

#include "autograd/function.h"
#include "ops/combine.h"
#include "ops/dispatch.h"
#include "ops/exchange.h"
#include "ops/experts.h"
#include "ops/losses.h"
#include "ops/router.h"
#ifdef FASTMOE_CUDA
#include "cuda/torch/explain.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["python"] = PY_VERSION;
  info["compiler"] = __VERSION__;
#ifdef FASTMOE_CUDA
  info["cuda"] = FASTMOE_CUDA;
#else
  info["cuda"] = py::none();
#endif
#ifdef FASTMOE_SM90
  info["hopper"] = true;
#else
  info["hopper"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fastmoe_cpp;
  using namespace pybind11::literals;
  m.doc() =
      "The C++ autograd functions of fastmoe_cpp. T tokens, H hidden, I intermediate, E experts, K experts a token.";
  m.def("build_info", &build_info, "What this library was built for: torch, python, compiler, cuda (or None), hopper.");

#ifdef FASTMOE_CUDA
  m.def(
      "explain_experts",
      [](const std::string& dtype, int64_t tokens, int64_t hidden, int64_t intermediate, int64_t experts, int64_t top_k,
         const std::string& activation, int capability, int multiprocessors, int64_t shared_bytes,
         const std::string& wish) {
        return cuda::explain_experts(dtype, tokens, hidden, intermediate, experts, top_k, activation,
                                     {capability, multiprocessors, shared_bytes}, wish);
      },
      "dtype"_a, "tokens"_a, "hidden"_a, "intermediate"_a, "experts"_a, "top_k"_a, "activation"_a, py::kw_only(),
      "capability"_a, "multiprocessors"_a, "shared_bytes"_a, "wish"_a = "",
      "Which kernels a layer runs with on a GPU of these properties, and why: a line for the path, six for the products.");
#endif

  m.def("saves_for_itself", &autograd::saves_for_itself,
        "Whether what an autograd Function saves now is seen by nobody else: no saved-tensor hook is set.");
  m.def("last_use", &autograd::last_use, "saved"_a, "grad"_a,
        "Whether backward of grad, which calls this, may overwrite what forward saved for it: the graph is not kept.");

  // Without the interpreter's lock, as torch.ops calls them: what an operator waits for may need it on another thread (an
  // exchange its group's, which drops tensors that Python knows).
  const auto def = [&m](const char* name, auto function, auto... extra) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>(), extra...);
  };
  def("router_logits", &router_logits, "hidden_states"_a, "weight"_a, "bias"_a = py::none(),
      "hidden_states [T, H] @ weight [E, H].T (+ bias [E]) -> [T, E] in float32, float64 if an operand is.");
  def(
      "route",
      [](const at::Tensor& logits, int64_t top_k, const std::optional<at::Tensor>& expert_bias,
         const std::optional<at::Tensor>& selection_scores, const std::optional<at::Tensor>& topk_ids,
         const std::string& score_function, bool scores_after_topk, bool renormalize, double renormalize_epsilon,
         double scaling_factor, int64_t num_groups, int64_t topk_groups, const std::string& group_score) {
        return route(logits, top_k, expert_bias, selection_scores, topk_ids, score_function, scores_after_topk,
                     renormalize, renormalize_epsilon, scaling_factor, num_groups, topk_groups, group_score);
      },
      "logits"_a, "top_k"_a, py::kw_only(), "expert_bias"_a = py::none(), "selection_scores"_a = py::none(),
      "topk_ids"_a = py::none(), "score_function"_a = "softmax", "scores_after_topk"_a = false, "renormalize"_a = true,
      "renormalize_epsilon"_a = 0.0, "scaling_factor"_a = 1.0, "num_groups"_a = 1, "topk_groups"_a = 1,
      "group_score"_a = "max",
      "logits [T, E] -> (topk_weights [T, K], topk_ids [T, K] int64, scores [T, E]). Ties go to the lower id, NaN ranks "
      "last; expert_bias and selection_scores only select; a given topk_ids is replayed.");
  def("sinkhorn", &sinkhorn, "logits"_a, "iterations"_a = 0, "tolerance"_a = 1e-4,
      "Sinkhorn-normalised exp(logits) [T, E] for selection; iterations = 0 runs to the tolerance. No gradient.");
  def(
      "dispatch",
      [](const at::Tensor& topk_ids, int64_t num_experts, const std::optional<at::Tensor>& topk_weights,
         std::optional<int64_t> capacity, const std::string& drop_policy,
         const std::optional<at::Tensor>& padding_mask) {
        return dispatch(topk_ids, num_experts, topk_weights,
                        capacity ? std::optional<c10::SymInt>(*capacity) : std::nullopt, drop_policy, padding_mask);
      },
      "topk_ids"_a, "num_experts"_a, py::kw_only(), "topk_weights"_a = py::none(), "capacity"_a = py::none(),
      "drop_policy"_a = "position", "padding_mask"_a = py::none(),
      "topk_ids [T, K] -> (slot_index [T*K], token_slot [T, K], expert_offsets [E+1], int32; tokens_per_expert [E] int64).");
  def(
      "route_and_dispatch",
      [](const at::Tensor& hidden_states, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
         int64_t top_k, const std::optional<at::Tensor>& expert_bias, const std::string& score_function,
         bool scores_after_topk, bool renormalize, double renormalize_epsilon, double scaling_factor,
         int64_t num_groups, int64_t topk_groups, const std::string& group_score) {
        return route_and_dispatch(hidden_states, weight, bias, top_k, expert_bias, score_function, scores_after_topk,
                                  renormalize, renormalize_epsilon, scaling_factor, num_groups, topk_groups,
                                  group_score);
      },
      "hidden_states"_a, "weight"_a, "bias"_a, "top_k"_a, py::kw_only(), "expert_bias"_a = py::none(),
      "score_function"_a = "softmax", "scores_after_topk"_a = false, "renormalize"_a = true,
      "renormalize_epsilon"_a = 0.0, "scaling_factor"_a = 1.0, "num_groups"_a = 1, "topk_groups"_a = 1,
      "group_score"_a = "max",
      "What router_logits, route and dispatch return, in one call: (logits, topk_weights, topk_ids, scores, slot_index, "
      "token_slot, expert_offsets, tokens_per_expert).");
  def("gather", &gather, "hidden_states"_a, "slot_index"_a, "token_slot"_a, "expert_offsets"_a,
      "hidden_states [T, H] -> rows [T*K, H] in expert order; rows of no slot are zero.");
  def(
      "experts",
      [](const at::Tensor& hidden_states, const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
         const at::Tensor& topk_weights, const at::Tensor& slot_index, const at::Tensor& token_slot,
         const at::Tensor& expert_offsets, const std::optional<at::Tensor>& gate_up_bias,
         const std::optional<at::Tensor>& down_bias, const std::string& activation, double activation_alpha,
         double activation_limit, bool interleaved, bool weight_on_input, bool recompute) {
        return experts(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                       gate_up_bias, down_bias, activation, activation_alpha, activation_limit, interleaved,
                       weight_on_input, recompute);
      },
      "hidden_states"_a, "gate_up_proj"_a, "down_proj"_a, "topk_weights"_a, "slot_index"_a, "token_slot"_a,
      "expert_offsets"_a, py::kw_only(), "gate_up_bias"_a = py::none(), "down_bias"_a = py::none(),
      "activation"_a = "swiglu", "activation_alpha"_a = 1.702, "activation_limit"_a = 7.0, "interleaved"_a = false,
      "weight_on_input"_a = false, "recompute"_a = false,
      "The grouped MLP over a plan, summed into tokens: [T, H] -> [T, H]. gate_up_proj [E, 2I, H], down_proj [E, H, I].");
  def("grouped_linear", &grouped_linear, "rows"_a, "weight"_a, "expert_offsets"_a, "bias"_a = py::none(),
      "rows [S, in] in expert order, weight [E, out, in] (+ bias [E, out]) -> [S, out].");
  def("combine", &combine, "rows"_a, "topk_weights"_a, "slot_index"_a, "token_slot"_a, "expert_offsets"_a,
      "rows [T*K, H] -> [T, H]: the sum over k of topk_weights[t, k] * rows[token_slot[t, k]], in order of k.");
  def(
      "exchange",
      [](const at::Tensor& rows, const std::vector<int64_t>& send_counts, const std::vector<int64_t>& recv_counts,
         const std::string& group_name, const std::string& operation, const std::string& caller) {
        return exchange(rows, c10::fromIntArrayRefSlow(send_counts), c10::fromIntArrayRefSlow(recv_counts), group_name,
                        operation, caller);
      },
      "rows"_a, "send_counts"_a, "recv_counts"_a, "group_name"_a, "operation"_a = "exchange", "caller"_a = "this rank",
      "rows [N, H] -> [sum(recv_counts), H]: consecutive rows to the ranks of a group, and theirs from them.");
  def("expert_counts", &expert_counts, "topk_ids"_a, "num_experts"_a, "padding_mask"_a = py::none(),
      "topk_ids [S, L, K] -> pairs an expert was asked for in each sequence [S, E] int64.");
  def("balance_loss", &balance_loss, "scores"_a, "tokens_per_expert"_a, "scale"_a, "padding_mask"_a = py::none(),
      "scale * sum of tokens_per_expert [S, E] * (scores [S, L, E] summed over unpadded l).");
  def("z_loss", &z_loss, "logits"_a, "scale"_a = 1.0, "padding_mask"_a = py::none(),
      "scale * mean over unpadded tokens of logsumexp(logits [T, E])^2.");
  def("update_expert_bias", &update_expert_bias, "expert_bias"_a, "tokens_per_expert"_a, "rate"_a,
      "zero_mean"_a = false, "expert_bias [E] += rate * sign(mean(counts) - counts), in place.");
}
