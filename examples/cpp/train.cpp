// Trains a Mixture-of-Experts layer in a C++ program, saves it, loads it into another and compares their outputs.
//
// The task: eight kinds of token, and for each kind another random linear map of it to be learned. A layer with eight
// experts can give each kind its own.
#include <fastmoe_cpp/fastmoe_cpp.h>
#include <torch/torch.h>

#include <cstdio>
#include <string>

namespace {

constexpr int64_t kKinds = 8, kHidden = 32, kTokens = 512, kSteps = 300;

// Tokens [T, H] around their kind's centre, and what is to be learned of them [T, H].
struct Task {
  torch::Tensor centres = torch::randn({kKinds, kHidden}) * 2;
  torch::Tensor maps = torch::randn({kKinds, kHidden, kHidden}) / std::sqrt(static_cast<double>(kHidden));

  std::pair<torch::Tensor, torch::Tensor> sample() const {
    const auto kind = torch::randint(kKinds, {kTokens});
    const auto offset = torch::randn({kTokens, kHidden});
    const auto target = torch::einsum("th,tho->to", {offset, maps.index({kind})});
    return {centres.index({kind}) + offset, target};
  }
};

}  // namespace

int main(int argc, char** argv) {
  const std::string path = argc > 1 ? argv[1] : "moe.pt";
  torch::manual_seed(0);
  const Task task;
  const auto options = fastmoe_cpp::MoEOptions(kHidden, /*intermediate_size=*/64, /*num_experts=*/kKinds)
                           .top_k(2)
                           .router(fastmoe_cpp::RouterOptions().balance_loss_coefficient(0.01))
                           .initializer_range(0.2);
  fastmoe_cpp::MoE layer(options);
  torch::optim::Adam optimizer(layer->parameters(), torch::optim::AdamOptions(3e-3));

  double first = 0, last = 0;
  for (int64_t step = 0; step <= kSteps; ++step) {
    const auto [x, target] = task.sample();
    const auto out = layer->forward_with_routing(x);
    const auto loss = torch::mse_loss(out.hidden_states, target);
    optimizer.zero_grad();
    (loss + out.aux_loss).backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
    if (step % 50 == 0)
      std::printf("step %3ld   loss %.4f   busiest expert %.0f%% of the tokens\n", static_cast<long>(step), last,
                  100.0 * out.tokens_per_expert.max().item<double>() / kTokens);
  }

  torch::save(layer, path);
  fastmoe_cpp::MoE loaded(options);
  torch::load(loaded, path);
  torch::NoGradGuard guard;
  const auto x = task.sample().first;
  const bool equal = torch::equal(layer(x), loaded(x));
  std::printf("saved to %s and loaded: outputs are %s\n", path.c_str(), equal ? "equal" : "DIFFERENT");
  const bool learned = last < 0.5 * first;
  if (!learned) std::printf("the loss did not fall by half: %.4f to %.4f\n", first, last);
  return equal && learned ? 0 : 1;
}
