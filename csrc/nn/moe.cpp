#include "moe.h"

#include <torch/csrc/autograd/custom_function.h>

#include "../ops/checks.h"
#include "../ops/dispatch.h"
#include "../ops/experts.h"
#include "../ops/losses.h"
#include "../ops/router.h"

namespace fastmoe_cpp {
namespace {

MoEOptions checked(const MoEOptions& options) {
  options.check();
  return options;
}

std::optional<at::Tensor> optional(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

// The weights themselves; where a gradient flows back through them, scale * loss is trained on as well.
struct AddGradient : torch::autograd::Function<AddGradient> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& weights, const at::Tensor& loss,
                            double scale) {
    ctx->saved_data["grad"] = at::full({}, scale, loss.options());
    return weights.view_as(weights);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    return {grads[0], ctx->saved_data["grad"].toTensor(), at::Tensor()};
  }
};

at::Tensor activate(const at::Tensor& pre_activation, const MoEOptions& o) {
  const auto curve = [](const std::string& name, const at::Tensor& x) {
    if (name == "silu" || name == "swiglu") return at::silu(x);
    if (name == "gelu" || name == "geglu") return at::gelu(x);
    if (name == "gelu_tanh" || name == "geglu_tanh") return at::gelu(x, "tanh");
    return name == "relu2" ? at::relu(x).square() : at::relu(x);
  };
  if (!o.gated()) return curve(o.activation(), pre_activation);
  auto halves = pre_activation.chunk(2, -1);
  if (o.activation() != "clamped_swiglu") return curve(o.activation(), halves[0]) * halves[1];
  const double limit = o.activation_limit();
  // not clamp, whose gradient exactly at a limit differs between releases of torch
  const auto gate = at::where(halves[0] > limit, limit, halves[0]);
  const auto up = at::where(halves[1] > limit, limit, at::where(halves[1] < -limit, -limit, halves[1]));
  return gate * at::sigmoid(gate * o.activation_alpha()) * (up + 1);
}

}  // namespace

RouterImpl::RouterImpl(const MoEOptions& options_) : options(checked(options_)) { reset(); }

void RouterImpl::reset() {
  weight = register_parameter("weight", torch::empty({options.num_experts(), options.hidden_size()}));
  if (options.router().bias()) bias = register_parameter("bias", torch::empty({options.num_experts()}));
  if (options.router().expert_bias())
    expert_bias = register_buffer("expert_bias", torch::zeros({options.num_experts()}, torch::kFloat));
  reset_parameters();
}

void RouterImpl::reset_parameters() {
  torch::NoGradGuard guard;
  weight.normal_(0.0, options.initializer_range());
  if (bias.defined()) bias.zero_();
  if (expert_bias.defined()) expert_bias.zero_();
  tokens_per_expert = at::Tensor();
}

at::Tensor RouterImpl::jitter(const at::Tensor& hidden_states) const {
  const double eps = options.router().jitter_eps();
  if (!is_training() || eps == 0) return hidden_states;
  return hidden_states * at::empty_like(hidden_states).uniform_(1.0 - eps, 1.0 + eps);
}

RouterImpl::Output RouterImpl::forward(const at::Tensor& hidden_states, const std::optional<at::Tensor>& topk_ids) {
  const auto& r = options.router();
  auto logits = router_logits(r.dtype() == torch::kDouble ? hidden_states.to(torch::kDouble) : hidden_states, weight,
                              optional(bias));
  if ((r.dtype() == torch::kBFloat16 || r.dtype() == torch::kHalf) && logits.scalar_type() != torch::kDouble)
    logits = logits.to(r.dtype()).to(torch::kFloat);
  std::optional<at::Tensor> selection;
  if (r.sinkhorn() && is_training() && !topk_ids)
    selection = sinkhorn(logits, r.sinkhorn_iterations(), r.sinkhorn_tolerance());
  auto [weights, ids, scores] = route(
      logits, options.top_k(), optional(expert_bias), selection, topk_ids, r.score_function(), r.scores_after_topk(),
      r.renormalize(), r.renormalize_epsilon(), r.scaling_factor(), r.num_groups(), r.topk_groups(), r.group_score());
  return {logits, weights, ids, scores};
}

bool RouterImpl::is_plain() const {
  const auto& r = options.router();
  return r.dtype() == torch::kFloat && !(r.sinkhorn() && is_training());
}

std::pair<RouterImpl::Output, RouterImpl::Plan> RouterImpl::route_and_dispatch(const at::Tensor& hidden_states) const {
  const auto& r = options.router();
  auto [logits, weights, ids, scores, slot_index, token_slot, expert_offsets, tokens_per_expert] =
      fastmoe_cpp::route_and_dispatch(hidden_states, weight, optional(bias), options.top_k(), optional(expert_bias),
                                      r.score_function(), r.scores_after_topk(), r.renormalize(),
                                      r.renormalize_epsilon(), r.scaling_factor(), r.num_groups(), r.topk_groups(),
                                      r.group_score());
  return {{logits, weights, ids, scores}, {slot_index, token_slot, expert_offsets, tokens_per_expert}};
}

void RouterImpl::count(const at::Tensor& counts) {
  if (!expert_bias.defined() || !is_training()) return;
  tokens_per_expert = tokens_per_expert.defined() ? tokens_per_expert.to(counts.device()) + counts : counts.clone();
}

void RouterImpl::update_expert_bias() {
  if (!expert_bias.defined() || !tokens_per_expert.defined()) return;
  const auto& r = options.router();
  fastmoe_cpp::update_expert_bias(expert_bias, tokens_per_expert, r.expert_bias_update_rate(),
                                  r.expert_bias_zero_mean());
  tokens_per_expert = at::Tensor();
}

void RouterImpl::keep_expert_bias(const at::Tensor& before) {
  if (before.defined()) expert_bias.set_data(before.to(weight.device()));
}

void RouterImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  const auto before = expert_bias.defined() ? expert_bias.detach().clone() : expert_bias;
  torch::nn::Module::to(device, dtype, non_blocking);
  keep_expert_bias(before);
}

void RouterImpl::to(torch::Dtype dtype, bool non_blocking) {
  const auto before = expert_bias.defined() ? expert_bias.detach().clone() : expert_bias;
  torch::nn::Module::to(dtype, non_blocking);
  keep_expert_bias(before);
}

void RouterImpl::pretty_print(std::ostream& stream) const {
  stream << "fastmoe_cpp::Router(hidden_size=" << options.hidden_size() << ", num_experts=" << options.num_experts()
         << ", top_k=" << options.top_k() << ")";
}

ExpertsImpl::ExpertsImpl(const MoEOptions& options_) : options(checked(options_)) { reset(); }

void ExpertsImpl::reset() {
  const int64_t experts = options.num_experts(), hidden = options.hidden_size();
  gate_up_proj = register_parameter("gate_up_proj", torch::empty({experts, options.gate_up_size(), hidden}));
  down_proj = register_parameter("down_proj", torch::empty({experts, hidden, options.intermediate_size()}));
  if (options.bias()) {
    gate_up_bias = register_parameter("gate_up_bias", torch::empty({experts, options.gate_up_size()}));
    down_bias = register_parameter("down_bias", torch::empty({experts, hidden}));
  }
  reset_parameters();
}

void ExpertsImpl::reset_parameters() {
  torch::NoGradGuard guard;
  gate_up_proj.normal_(0.0, options.initializer_range());
  down_proj.normal_(0.0, options.initializer_range());
  if (gate_up_bias.defined()) gate_up_bias.zero_();
  if (down_bias.defined()) down_bias.zero_();
}

at::Tensor ExpertsImpl::forward(const at::Tensor& hidden_states, const at::Tensor& topk_weights,
                                const at::Tensor& slot_index, const at::Tensor& token_slot,
                                const at::Tensor& expert_offsets) {
  return experts(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                 optional(gate_up_bias), optional(down_bias), options.activation(), options.activation_alpha(),
                 options.activation_limit(), options.interleaved(), options.weight_on_input(), options.recompute());
}

void ExpertsImpl::pretty_print(std::ostream& stream) const {
  stream << "fastmoe_cpp::Experts(num_experts=" << options.num_experts() << ", hidden_size=" << options.hidden_size()
         << ", intermediate_size=" << options.intermediate_size() << ", activation=" << options.activation()
         << ", bias=" << std::boolalpha << options.bias() << ")";
}

SharedExpertsImpl::SharedExpertsImpl(const MoEOptions& options_) : options(checked(options_)) {
  TORCH_CHECK_VALUE(options.shared_intermediate_size(), "shared_intermediate_size must be set for shared experts");
  reset();
}

void SharedExpertsImpl::reset() {
  const int64_t inner = *options.shared_intermediate_size(), hidden = options.hidden_size();
  gate_up_proj = register_parameter("gate_up_proj", torch::empty({inner * (options.gated() ? 2 : 1), hidden}));
  down_proj = register_parameter("down_proj", torch::empty({hidden, inner}));
  if (options.shared_expert_gate()) gate = register_parameter("gate", torch::empty({1, hidden}));
  reset_parameters();
}

void SharedExpertsImpl::reset_parameters() {
  torch::NoGradGuard guard;
  for (auto& weight : parameters()) weight.normal_(0.0, options.initializer_range());
}

at::Tensor SharedExpertsImpl::forward(const at::Tensor& hidden_states) {
  const auto output = at::linear(activate(at::linear(hidden_states, gate_up_proj), options), down_proj);
  return gate.defined() ? at::sigmoid(at::linear(hidden_states, gate)) * output : output;
}

MoEImpl::MoEImpl(const MoEOptions& options_) : options(checked(options_)) { reset(); }

void MoEImpl::reset() {
  router = register_module("router", Router(options));
  experts = register_module("experts", Experts(options));
  if (options.shared_intermediate_size()) shared_experts = register_module("shared_experts", SharedExperts(options));
}

void MoEImpl::reset_parameters() {
  router->reset_parameters();
  experts->reset_parameters();
  if (shared_experts) shared_experts->reset_parameters();
}

MoEImpl::Pass MoEImpl::run(const at::Tensor& hidden_states, const std::optional<at::Tensor>& padding_mask,
                           const std::optional<at::Tensor>& topk_ids, bool trains_losses) {
  const int64_t hidden = options.hidden_size();
  TORCH_CHECK_VALUE(hidden_states.dim() >= 1 && hidden_states.size(-1) == hidden,
                    "hidden_states must have shape [..., ", hidden, "], got ", hidden_states.sizes());
  auto leading = hidden_states.sizes().vec();
  leading.pop_back();
  auto x = hidden_states.reshape({-1, hidden});
  Pass pass;
  if (padding_mask) {
    TORCH_CHECK_TYPE(padding_mask->scalar_type() == torch::kBool, "padding_mask must be bool, true for padding, got ",
                     padding_mask->scalar_type());
    TORCH_CHECK_VALUE(padding_mask->sizes() == at::IntArrayRef(leading), "padding_mask must have shape ",
                      at::IntArrayRef(leading), " for hidden_states ", hidden_states.sizes(), ", got ",
                      padding_mask->sizes());
    pass.padding_mask = padding_mask->reshape({-1});
  }
  std::optional<at::Tensor> replayed;
  if (topk_ids) {
    auto expected = leading;
    expected.push_back(options.top_k());
    TORCH_CHECK_VALUE(topk_ids->sizes() == at::IntArrayRef(expected), "topk_ids must have shape ",
                      at::IntArrayRef(expected), ", got ", topk_ids->sizes());
    replayed = topk_ids->reshape({-1, options.top_k()});
  }
  const auto routed = router->jitter(x);
  if (options.router().jitter_experts()) x = routed;
  choose(pass, routed, replayed, hidden_states.scalar_type());
  router->count(pass.plan.tokens_per_expert);
  auto weights = pass.routing.topk_weights.to(accumulate_type(hidden_states.scalar_type()));
  // not at the output, which a model may change in place
  if (trains_losses) weights = AddGradient::apply(weights, std::get<2>(losses(pass)), aux_loss_scale);
  pass.output = experts->forward(x, weights, pass.plan.slot_index, pass.plan.token_slot, pass.plan.expert_offsets);
  if (shared_experts) pass.output = pass.output + shared_experts->forward(x);
  pass.output = pass.output.to(hidden_states.scalar_type());
  return pass;
}

void MoEImpl::choose(Pass& pass, const at::Tensor& x, const std::optional<at::Tensor>& topk_ids, torch::Dtype type) {
  const auto capacity = options.capacity(x.size(0), is_training());
  const bool plain = !capacity && !pass.padding_mask && !topk_ids && router->is_plain();
  // a router put in its place may know fewer experts
  if (plain && router->weight.dim() == 2 && router->weight.size(0) == options.num_experts()) {
    std::tie(pass.routing, pass.plan) = router->route_and_dispatch(x);
    return;
  }
  pass.routing = router->forward(x, topk_ids);
  // ids are on the device, where one too high can only end the process
  TORCH_CHECK_VALUE(pass.routing.logits.size(-1) <= options.num_experts(),
                    "router must choose among num_experts = ", options.num_experts(), " experts, got logits of shape ",
                    pass.routing.logits.sizes());
  const bool by_weight = options.drop_policy() == "probs";
  const auto weights =
      by_weight ? std::optional(pass.routing.topk_weights.detach().to(accumulate_type(type))) : std::nullopt;
  std::tie(pass.plan.slot_index, pass.plan.token_slot, pass.plan.expert_offsets, pass.plan.tokens_per_expert) =
      dispatch(pass.routing.topk_ids, options.num_experts(), weights,
               capacity ? std::optional<c10::SymInt>(*capacity) : std::nullopt, options.drop_policy(),
               pass.padding_mask);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> MoEImpl::losses(const Pass& pass) const {
  const auto& r = options.router();
  auto probs = pass.routing.scores;
  if (r.score_function() != "softmax") probs = probs / (probs.sum(-1, true) + 1e-20);
  auto ids = pass.routing.topk_ids;
  if (r.expert_bias() || r.num_groups() > 1 || r.sinkhorn())  // the choices the probabilities alone would make
    ids =
        std::get<1>(route(probs.detach(), options.top_k(), std::nullopt, std::nullopt, std::nullopt, "softmax", true));
  std::optional<at::Tensor> mask;
  if (pass.padding_mask) mask = pass.padding_mask->unsqueeze(0);
  const auto tokens = mask ? mask->logical_not().sum(1, true).clamp_min(1)
                           : at::full({}, std::max<int64_t>(probs.size(0), 1), ids.options());
  const auto counts = expert_counts(ids.unsqueeze(0), options.num_experts(), mask).to(probs.scalar_type());
  const auto share = counts / (tokens * options.top_k());
  const auto balance =
      balance_loss(probs.unsqueeze(0), share / tokens, static_cast<double>(options.num_experts()), mask);
  const auto z = z_loss(pass.routing.logits, 1.0, pass.padding_mask);
  return {balance, z, balance * r.balance_loss_coefficient() + z * r.z_loss_coefficient()};
}

at::Tensor MoEImpl::forward(const at::Tensor& hidden_states, const std::optional<at::Tensor>& padding_mask) {
  const auto& r = options.router();
  const bool trains_losses =
      is_training() && at::GradMode::is_enabled() && (r.balance_loss_coefficient() > 0 || r.z_loss_coefficient() > 0);
  return run(hidden_states, padding_mask, std::nullopt, trains_losses).output.reshape(hidden_states.sizes());
}

MoEOutput MoEImpl::forward_with_routing(const at::Tensor& hidden_states, const std::optional<at::Tensor>& padding_mask,
                                        const std::optional<at::Tensor>& topk_ids) {
  const auto pass = run(hidden_states, padding_mask, topk_ids, false);
  const auto [balance, z, aux] = losses(pass);
  return {pass.output.reshape(hidden_states.sizes()),
          pass.routing.logits,
          pass.routing.scores,
          pass.routing.topk_weights,
          pass.routing.topk_ids,
          pass.plan.tokens_per_expert,
          pass.plan.token_slot < 0,
          balance,
          z,
          aux};
}

}  // namespace fastmoe_cpp
