// The layer against a plain LibTorch loop over tokens and experts.
#include <fastmoe_cpp/fastmoe_cpp.h>
#include <torch/torch.h>

#include <cstdio>

#include "test.h"

namespace {

namespace F = torch::nn::functional;
using fastmoe_cpp::MoE;
using fastmoe_cpp::MoEOptions;
using fastmoe_cpp::RouterOptions;

// A layer in float64 with weights and biases that matter.
MoE layer_of(const MoEOptions& options, uint64_t seed = 0) {
  torch::manual_seed(seed);
  MoE layer(options);
  layer->to(torch::kDouble);
  torch::NoGradGuard guard;
  for (auto& p : layer->parameters()) p.normal_(0.0, 0.3);
  return layer;
}

torch::Tensor weighted_sum(const MoE& layer, const torch::Tensor& x, const torch::Tensor& ids,
                           const torch::Tensor& weights) {
  std::vector<torch::Tensor> rows;
  const auto& e = layer->experts;
  for (int64_t t = 0; t < x.size(0); ++t) {
    auto sum = torch::zeros({x.size(1)}, x.options());
    for (int64_t k = 0; k < ids.size(1); ++k) {
      const int64_t expert = ids[t][k].item<int64_t>();
      if (expert < 0) continue;
      auto up = torch::mv(e->gate_up_proj[expert], x[t]);
      if (e->gate_up_bias.defined()) up = up + e->gate_up_bias[expert];
      const auto halves = up.chunk(2);
      auto y = torch::mv(e->down_proj[expert], torch::silu(halves[0]) * halves[1]);
      if (e->down_bias.defined()) y = y + e->down_bias[expert];
      sum = sum + weights[t][k] * y;
    }
    rows.push_back(sum);
  }
  return torch::stack(rows);
}

// Softmax, the K best, renormalised.
torch::Tensor plain(const MoE& layer, const torch::Tensor& x) {
  auto logits = torch::matmul(x, layer->router->weight.t());
  if (layer->router->bias.defined()) logits = logits + layer->router->bias;
  const auto [weights, ids] = torch::topk(torch::softmax(logits, -1), layer->options.top_k(), -1);
  return weighted_sum(layer, x, ids, weights / weights.sum(-1, true));
}

void close(const torch::Tensor& a, const torch::Tensor& b, double tolerance = 1e-10) {
  CHECK_EQUAL(a.sizes(), b.sizes());
  const double error = (a - b).abs().max().item<double>(), scale = b.abs().max().item<double>();
  CHECK(scale > 0);
  if (!(error <= tolerance * scale)) testing::fail(__FILE__, __LINE__, "error " + std::to_string(error / scale));
}

}  // namespace

TEST(forward_and_gradients_equal_a_plain_loop) {
  for (bool bias : {false, true}) {
    const auto layer = layer_of(MoEOptions(12, 10, 6).top_k(3).bias(bias).router(RouterOptions().bias(bias)));
    const auto x = torch::randn({9, 12}, torch::kDouble), grad = torch::randn({9, 12}, torch::kDouble);
    auto mine = x.clone().set_requires_grad(true), theirs = x.clone().set_requires_grad(true);
    const auto y = MoE(layer)(mine);
    y.backward(grad);
    std::vector<torch::Tensor> grads;
    for (auto& p : layer->parameters()) {
      grads.push_back(p.grad().clone());
      p.mutable_grad().reset();
    }
    const auto expected = plain(layer, theirs);
    expected.backward(grad);
    close(y, expected);
    close(mine.grad(), theirs.grad());
    const auto parameters = layer->parameters();
    CHECK_EQUAL(parameters.size(), bias ? 6u : 3u);
    for (size_t i = 0; i < parameters.size(); ++i) close(grads[i], parameters[i].grad());
  }
}

TEST(any_leading_shape_and_no_token_at_all) {
  auto layer = layer_of(MoEOptions(8, 8, 4));
  const auto x = torch::randn({2, 3, 5, 8}, torch::kDouble);
  const auto y = layer(x);
  CHECK_EQUAL(y.sizes(), x.sizes());
  CHECK(torch::equal(y.reshape({30, 8}), layer(x.reshape({30, 8}))));
  close(layer(x[1][2][4]), y[1][2][4]);
  const auto none = layer(torch::empty({0, 8}, torch::kDouble));
  CHECK_EQUAL(none.numel(), 0);
  none.sum().backward();
  CHECK(layer->experts->gate_up_proj.grad().eq(0).all().item<bool>());
}

TEST(routing_is_returned_and_can_be_replayed) {
  auto layer = layer_of(MoEOptions(8, 8, 5).top_k(2));
  const auto x = torch::randn({4, 6, 8}, torch::kDouble);
  const auto out = layer->forward_with_routing(x);
  CHECK_EQUAL(out.router_logits.sizes(), torch::IntArrayRef({24, 5}));
  CHECK_EQUAL(out.topk_ids.sizes(), torch::IntArrayRef({24, 2}));
  CHECK_EQUAL(out.tokens_per_expert.sum().item<int64_t>(), 48);
  CHECK(!out.dropped.any().item<bool>());
  close(out.topk_weights.sum(-1), torch::ones({24}, torch::kDouble));
  const auto again = layer->forward_with_routing(x, std::nullopt, out.topk_ids.reshape({4, 6, 2}));
  CHECK(torch::equal(again.hidden_states, out.hidden_states));
  const auto swapped = layer->forward_with_routing(x, std::nullopt, (out.topk_ids.reshape({4, 6, 2}) + 1) % 5);
  CHECK(!torch::allclose(swapped.hidden_states, out.hidden_states));
}

TEST(a_pass_is_its_parts_whether_gradients_are_asked_for_or_not) {
  const std::vector<RouterOptions> routers = {
      RouterOptions(),
      RouterOptions().bias(true).score_function("sigmoid").expert_bias(true).num_groups(3).topk_groups(2),
      RouterOptions().scores_after_topk(true).renormalize(false).scaling_factor(2.5),
      RouterOptions().renormalize_epsilon(0.5).num_groups(2).topk_groups(1).group_score("top2_sum"),
      RouterOptions().dtype(torch::kBFloat16),
      RouterOptions().sinkhorn(true).score_function("sigmoid").renormalize(false),
  };
  for (size_t i = 0; i < 2 * routers.size(); ++i) {
    const auto type = i % 2 ? torch::kFloat : torch::kDouble;
    auto layer = layer_of(MoEOptions(8, 10, 6).top_k(2).router(routers[i / 2]), i);
    if (layer->router->expert_bias.defined()) layer->router->expert_bias.uniform_(-1.0, 1.0);
    layer->to(type);
    const auto x = torch::randn({11, 8}, type);
    for (const bool gradients : {true, false}) {
      const torch::AutoGradMode mode(gradients);
      const auto routing = layer->router->forward(x);
      const auto [slots, places, offsets, counts] = fastmoe_cpp::dispatch(routing.topk_ids, 6);
      const auto out = layer->forward_with_routing(x);
      CHECK(torch::equal(out.router_logits, routing.logits));
      CHECK(torch::equal(out.router_scores, routing.scores));
      CHECK(torch::equal(out.topk_ids, routing.topk_ids));
      CHECK(torch::equal(out.topk_weights, routing.topk_weights));
      CHECK(torch::equal(out.tokens_per_expert, counts));
      CHECK(torch::equal(out.hidden_states, layer->experts->forward(x, routing.topk_weights, slots, places, offsets)));
      CHECK_EQUAL(out.hidden_states.requires_grad(), gradients);
    }
  }
}

TEST(capacity_differs_in_training_and_evaluation) {
  auto layer = layer_of(MoEOptions(8, 8, 4).top_k(2).capacity_factor(0.5).eval_capacity_factor(0.0));
  const auto x = torch::randn({64, 8}, torch::kDouble);
  layer->train();
  const auto out = layer->forward_with_routing(x);
  const auto kept = torch::where(out.dropped, torch::full_like(out.topk_ids, -1), out.topk_ids);
  for (int64_t e = 0; e < 4; ++e) {
    const int64_t asked = out.tokens_per_expert[e].item<int64_t>();
    CHECK_EQUAL((kept == e).sum().item<int64_t>(), std::min<int64_t>(asked, 16));
  }
  close(out.hidden_states, weighted_sum(layer, x, kept, out.topk_weights));
  layer->eval();
  CHECK(layer(x).eq(0).all().item<bool>());
  CHECK_EQUAL(*MoEOptions(8, 8, 10).top_k(1).capacity_factor(1.1).capacity(100, true), 11);
  CHECK(!MoEOptions(8, 8, 10).capacity(100, true));
  CHECK_EQUAL(*MoEOptions(8, 8, 4).capacity_factor(1e-7).capacity(100000000, true), 5);
  CHECK(*MoEOptions(8, 8, 4).capacity_factor(1e300).capacity(1 << 30, true) >= int64_t{2} << 30);
}

TEST(padding_gets_no_expert) {
  auto layer = layer_of(MoEOptions(8, 8, 4));
  const auto x = torch::randn({3, 4, 8}, torch::kDouble);
  auto mask = torch::zeros({3, 4}, torch::kBool);
  mask[1].fill_(true);
  const auto out = layer->forward_with_routing(x, mask);
  CHECK(out.hidden_states[1].eq(0).all().item<bool>());
  CHECK(torch::equal(out.hidden_states[0], layer(x)[0]));
  CHECK_EQUAL(out.tokens_per_expert.sum().item<int64_t>(), 16);
}

TEST(losses_equal_their_formulas_and_reach_the_router) {
  const auto router = RouterOptions().balance_loss_coefficient(0.3).z_loss_coefficient(0.2);
  auto layer = layer_of(MoEOptions(8, 8, 4).top_k(2).router(router));
  const auto x = torch::randn({50, 8}, torch::kDouble);
  const auto out = layer->forward_with_routing(x);
  const auto share = out.tokens_per_expert.to(torch::kDouble) / 100;
  close(out.balance_loss, 4 * (share * torch::softmax(out.router_logits, -1).mean(0)).sum());
  close(out.z_loss, torch::logsumexp(out.router_logits, -1).square().mean());
  close(out.aux_loss, 0.3 * out.balance_loss + 0.2 * out.z_loss);

  // forward adds the same gradient to whatever flows back through its output, scaled
  const auto expected =
      torch::autograd::grad({out.hidden_states.sum() + 0.5 * out.aux_loss}, {layer->router->weight})[0];
  layer->aux_loss_scale = 0.5;
  layer->train();
  close(torch::autograd::grad({layer(x).sum()}, {layer->router->weight})[0], expected);
  const auto changed = layer(x).mul_(2);  // in place, as by a host's residual sum
  close(torch::autograd::grad({0.5 * changed.sum()}, {layer->router->weight})[0], expected);
  layer->eval();
  const auto without = torch::autograd::grad({layer(x).sum()}, {layer->router->weight})[0];
  CHECK(!torch::allclose(without, expected));
}

TEST(expert_bias_moves_against_the_load_and_stays_float32) {
  const auto router = RouterOptions().expert_bias(true).expert_bias_update_rate(0.25).score_function("sigmoid");
  auto layer = layer_of(MoEOptions(8, 8, 4).router(router));
  layer->to(torch::kBFloat16);
  CHECK_EQUAL(layer->router->expert_bias.scalar_type(), torch::kFloat);
  CHECK_EQUAL(layer->router->weight.scalar_type(), torch::kBFloat16);
  layer->to(torch::kDouble);
  const auto x = torch::randn({33, 8}, torch::kDouble);
  layer->train();
  auto counts = layer->forward_with_routing(x).tokens_per_expert;
  counts = counts + layer->forward_with_routing(x + 1).tokens_per_expert;
  layer->update_expert_bias();
  const auto load = counts.to(torch::kDouble);
  CHECK(torch::equal(layer->router->expert_bias, (0.25 * torch::sign(load.mean() - load)).to(torch::kFloat)));
  const auto before = layer->router->expert_bias.clone();
  layer->update_expert_bias();
  CHECK(torch::equal(layer->router->expert_bias, before));
}

TEST(shared_experts_are_added) {
  auto layer = layer_of(MoEOptions(8, 8, 4).shared_intermediate_size(6).shared_expert_gate(true));
  const auto x = torch::randn({10, 8}, torch::kDouble);
  const auto& s = layer->shared_experts;
  const auto halves = torch::matmul(x, s->gate_up_proj.t()).chunk(2, -1);
  const auto shared = torch::matmul(torch::silu(halves[0]) * halves[1], s->down_proj.t());
  close(layer(x), plain(layer, x) + torch::sigmoid(torch::matmul(x, s->gate.t())) * shared);
}

TEST(shared_experts_have_every_activation) {
  const auto x = torch::randn({5, 8}, torch::kDouble);
  for (const char* name :
       {"swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu", "silu", "gelu", "gelu_tanh", "relu", "relu2"}) {
    // One routed expert with the shared ones' weights computes the same.
    auto layer = layer_of(MoEOptions(8, 6, 1).top_k(1).activation(name).shared_intermediate_size(6));
    torch::NoGradGuard guard;
    layer->experts->gate_up_proj.copy_(layer->shared_experts->gate_up_proj.unsqueeze(0));
    layer->experts->down_proj.copy_(layer->shared_experts->down_proj.unsqueeze(0));
    close(layer(x), 2 * layer->shared_experts->forward(x));
  }
}

TEST(a_clone_has_weights_of_its_own) {
  const auto router = RouterOptions().bias(true).expert_bias(true).score_function("sigmoid");
  auto layer =
      layer_of(MoEOptions(8, 6, 4).bias(true).shared_intermediate_size(5).shared_expert_gate(true).router(router));
  layer->aux_loss_scale = 0.5;
  layer->eval();
  const auto x = torch::randn({9, 8}, torch::kDouble);
  const auto expected = layer(x);
  const auto copy = MoE(std::dynamic_pointer_cast<fastmoe_cpp::MoEImpl>(layer->clone()));
  CHECK(torch::equal(MoE(copy)(x), expected));
  CHECK_EQUAL(copy->aux_loss_scale, 0.5);
  CHECK_EQUAL(copy->parameters().size(), layer->parameters().size());
  CHECK_EQUAL(copy->router->expert_bias.scalar_type(), torch::kFloat);
  torch::NoGradGuard guard;
  for (auto& p : layer->parameters()) p.zero_();
  layer->router->expert_bias.fill_(7.0);
  CHECK(torch::equal(MoE(copy)(x), expected));
}

TEST(bad_options_are_one_sentence) {
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(0, 8, 4)), "hidden_size must be an integer of at least 1, got 0");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 4).top_k(5)), "top_k", "num_experts = 4", "got 5");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 1025)), "num_experts", "1024", "got 1025");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 4).activation("swish")), "activation", "'swiglu'", "got 'swish'");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 4).drop_policy("random")), "drop_policy", "got 'random'");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 4).capacity_factor(-1.0)), "capacity_factor", "got -1");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 4).activation("relu").interleaved(true)), "interleaved", "relu");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 4).shared_expert_gate(true)), "shared_expert_gate");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 6).router(RouterOptions().num_groups(4))), "num_groups", "got 4");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 8).top_k(3).router(RouterOptions().num_groups(4))), "top_k",
               "got 3");
  CHECK_THROWS(c10::ValueError, MoE(MoEOptions(8, 8, 4).router(RouterOptions().score_function("max"))),
               "score_function", "got 'max'");
}

TEST(bad_inputs_are_one_sentence) {
  auto layer = layer_of(MoEOptions(8, 8, 4));
  const auto x = torch::randn({3, 8}, torch::kDouble);
  CHECK_THROWS(c10::ValueError, layer(torch::randn({3, 7}, torch::kDouble)), "hidden_states", "[..., 8]", "[3, 7]");
  CHECK_THROWS(c10::TypeError, layer(x.to(torch::kFloat)), "must have the dtype of hidden_states", "got");
  CHECK_THROWS(c10::ValueError, layer(x, torch::zeros({4}, torch::kBool)), "padding_mask", "[3]", "[4]");
  CHECK_THROWS(c10::TypeError, layer(x, torch::zeros({3})), "padding_mask must be bool");
  auto larger = layer_of(MoEOptions(8, 8, 4));
  larger->router->weight.set_data(torch::randn({6, 8}, torch::kDouble));
  CHECK_THROWS(c10::ValueError, larger(x), "num_experts = 4 experts", "[3, 6]");
  CHECK_THROWS(c10::ValueError, layer->forward_with_routing(x, std::nullopt, torch::zeros({3, 3}, torch::kLong)),
               "topk_ids", "[3, 2]", "[3, 3]");
  CHECK_THROWS(c10::Error, layer->forward_with_routing(x, std::nullopt, torch::full({3, 2}, 4, torch::kLong)),
               "topk_ids", "4");
}

TEST(works_in_a_sequential_with_one_argument) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(4, 8), MoE(MoEOptions(8, 8, 4)), torch::nn::Linear(8, 2));
  CHECK_EQUAL(model->forward(torch::randn({5, 4})).sizes(), torch::IntArrayRef({5, 2}));
}
