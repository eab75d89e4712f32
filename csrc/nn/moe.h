// The layer as a torch::nn::Module: router, dispatch, experts, combine over the same operators as in Python.
//
//   fastmoe_cpp::MoE layer(fastmoe_cpp::MoEOptions(/*hidden_size=*/64, /*intermediate_size=*/128, /*num_experts=*/8));
//   auto y = layer(x);                               // one tensor of x's shape and dtype
//   auto out = layer->forward_with_routing(x);       // and everything there is to know about the pass
//
// Symbols: T tokens (the product of x's leading sizes), H hidden size, I expert intermediate size, E experts, K experts
// a token. Parameters have Python's names, so that a state dict travels between the two (see state_dict.h):
//   router.weight [E, H]             router.bias [E]             router.expert_bias [E] (a buffer, float32)
//   experts.gate_up_proj [E, 2I, H]  experts.down_proj [E, H, I] experts.gate_up_bias [E, 2I]  experts.down_bias [E, H]
//   shared_experts.gate_up_proj [2I, H]  shared_experts.down_proj [H, I]  shared_experts.gate [1, H]
// where the options ask for them ([E, I, H] and [I, H] for an ungated activation). A bad option, shape or id throws
// c10::ValueError and a bad dtype c10::TypeError: one sentence with the name, what was expected and what was found.
#pragma once
#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <optional>
#include <tuple>
#include <utility>

#include "options.h"

namespace fastmoe_cpp {

// One pass through the layer. Weights, logits, scores and losses are float32, or float64 for float64 routing.
struct MoEOutput {
  torch::Tensor hidden_states;      // the input's shape and dtype
  torch::Tensor router_logits;      // [T, E]
  torch::Tensor router_scores;      // [T, E] the score function over all experts
  torch::Tensor topk_weights;       // [T, K]
  torch::Tensor topk_ids;           // [T, K] int64
  torch::Tensor tokens_per_expert;  // [E] int64: pairs that asked for the expert, before capacity dropped any
  torch::Tensor dropped;            // [T, K] bool: pairs no expert computed (padding, an id of -1, or over capacity)
  torch::Tensor balance_loss;       // scalar, coefficient not applied
  torch::Tensor z_loss;             // scalar, coefficient not applied
  torch::Tensor aux_loss;           // scalar: both by their coefficients; add it to the training loss
};

// Hidden states [T, H] to logits, K weights and K expert ids a token, and the scores of all experts.
class RouterImpl : public torch::nn::Cloneable<RouterImpl> {
 public:
  explicit RouterImpl(const MoEOptions& options);
  void reset() override;  // registers parameters anew, as clone() asks
  void reset_parameters();

  struct Output {
    torch::Tensor logits, topk_weights, topk_ids, scores;  // [T, E], [T, K], [T, K] int64, [T, E]
  };
  struct Plan {
    torch::Tensor slot_index, token_slot, expert_offsets, tokens_per_expert;  // as fastmoe_cpp::dispatch returns them
  };
  // Given topk_ids [T, K] are replayed, with weights from the logits of now. Applies no jitter.
  Output forward(const torch::Tensor& hidden_states, const std::optional<torch::Tensor>& topk_ids = std::nullopt);
  // Whether forward without ids to replay is router_logits and route alone, nothing chosen at random or rounded.
  bool is_plain() const;
  // Where it is: forward, and fastmoe_cpp::dispatch of its choice, by one operator.
  std::pair<Output, Plan> route_and_dispatch(const torch::Tensor& hidden_states) const;
  torch::Tensor jitter(const torch::Tensor& hidden_states) const;
  void count(const torch::Tensor& tokens_per_expert);
  void update_expert_bias();

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  using torch::nn::Module::to;
  void pretty_print(std::ostream& stream) const override;

  MoEOptions options;
  torch::Tensor weight, bias;
  torch::Tensor expert_bias;        // stays float32 when the module changes dtype: steps of 1e-3 are lost in 16 bits
  torch::Tensor tokens_per_expert;  // [E] int64, of training since the last update; not saved

 private:
  void keep_expert_bias(const torch::Tensor& before);
};
TORCH_MODULE(Router);

// The routed experts: hidden_states [T, H], topk_weights [T, K] and the plan of fastmoe_cpp::dispatch to [T, H].
class ExpertsImpl : public torch::nn::Cloneable<ExpertsImpl> {
 public:
  explicit ExpertsImpl(const MoEOptions& options);
  void reset() override;
  void reset_parameters();
  torch::Tensor forward(const torch::Tensor& hidden_states, const torch::Tensor& topk_weights,
                        const torch::Tensor& slot_index, const torch::Tensor& token_slot,
                        const torch::Tensor& expert_offsets);
  void pretty_print(std::ostream& stream) const override;

  MoEOptions options;
  torch::Tensor gate_up_proj, down_proj, gate_up_bias, down_bias;
};
TORCH_MODULE(Experts);

// The experts every token visits, as one MLP: [..., H] to [..., H].
class SharedExpertsImpl : public torch::nn::Cloneable<SharedExpertsImpl> {
 public:
  explicit SharedExpertsImpl(const MoEOptions& options);
  void reset() override;
  void reset_parameters();
  torch::Tensor forward(const torch::Tensor& hidden_states);

  MoEOptions options;
  torch::Tensor gate_up_proj, down_proj, gate;
};
TORCH_MODULE(SharedExperts);

class MoEImpl : public torch::nn::Cloneable<MoEImpl> {
 public:
  explicit MoEImpl(const MoEOptions& options);
  MoEImpl(int64_t hidden_size, int64_t intermediate_size, int64_t num_experts)
      : MoEImpl(MoEOptions(hidden_size, intermediate_size, num_experts)) {}
  void reset() override;
  void reset_parameters();

  // hidden_states [..., H] to one tensor of its shape and dtype. padding_mask [...] bool is true for padding: such tokens
  // get no routed expert, take no capacity and count in no loss. While training, the gradient of aux_loss (times
  // aux_loss_scale) is added to whatever flows back through the output.
  torch::Tensor forward(const torch::Tensor& hidden_states,
                        const std::optional<torch::Tensor>& padding_mask = std::nullopt);
  // The same, returning the losses instead of adding their gradient. topk_ids [..., K] are experts chosen before.
  MoEOutput forward_with_routing(const torch::Tensor& hidden_states,
                                 const std::optional<torch::Tensor>& padding_mask = std::nullopt,
                                 const std::optional<torch::Tensor>& topk_ids = std::nullopt);
  // Once an optimizer step, where the options ask for expert_bias: moves it against the load counted since the last call.
  void update_expert_bias() { router->update_expert_bias(); }

  MoEOptions options;
  double aux_loss_scale = 1.0;
  Router router{nullptr};
  Experts experts{nullptr};
  SharedExperts shared_experts{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<torch::Tensor>())})

 private:
  struct Pass {
    torch::Tensor output;  // [T, H]
    RouterImpl::Output routing;
    RouterImpl::Plan plan;
    std::optional<torch::Tensor> padding_mask;  // [T]
  };
  Pass run(const torch::Tensor& hidden_states, const std::optional<torch::Tensor>& padding_mask,
           const std::optional<torch::Tensor>& topk_ids, bool trains_losses);
  // Sets pass.routing and pass.plan: x [T, H] as the router sees it, type the layer's input's.
  void choose(Pass& pass, const torch::Tensor& x, const std::optional<torch::Tensor>& topk_ids, torch::Dtype type);
  std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> losses(const Pass& pass) const;
};
TORCH_MODULE(MoE);

}  // namespace fastmoe_cpp
