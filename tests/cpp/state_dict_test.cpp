// What a layer is saved as and loaded from, and what is refused.
#include <fastmoe_cpp/fastmoe_cpp.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "test.h"

namespace {

using fastmoe_cpp::MoE;
using fastmoe_cpp::MoEOptions;
using fastmoe_cpp::RouterOptions;

// A file that is gone at the end of its test.
struct File {
  explicit File(const char* name) {
    const char* folder = std::getenv("TMPDIR");
    path = std::string(folder ? folder : "/tmp") + "/" + name;
  }
  ~File() { std::remove(path.c_str()); }
  std::string path;
};

MoEOptions options() {
  return MoEOptions(8, 6, 4).bias(true).shared_intermediate_size(5).router(
      RouterOptions().bias(true).expert_bias(true));
}

}  // namespace

TEST(archives_round_trip) {
  const File file("fastmoe_cpp_archive.pt");
  torch::manual_seed(1);
  MoE saved(options()), loaded(options());
  const auto x = torch::randn({7, 8});
  CHECK(!torch::equal(saved(x), loaded(x)));
  torch::save(saved, file.path);
  torch::load(loaded, file.path);
  CHECK(torch::equal(saved(x), loaded(x)));
}

TEST(state_dicts_round_trip_with_python_s_names) {
  const File file("fastmoe_cpp_state.pt");
  MoE saved(options()), loaded(options());
  std::string names;
  for (const auto& p : saved->named_parameters()) names += p.key() + " ";
  CHECK_EQUAL(names,
              "router.weight router.bias experts.gate_up_proj experts.down_proj experts.gate_up_bias experts.down_bias "
              "shared_experts.gate_up_proj shared_experts.down_proj ");
  {
    torch::NoGradGuard guard;
    saved->router->expert_bias.uniform_();
  }
  fastmoe_cpp::save_state_dict(*saved, file.path);
  fastmoe_cpp::load_state_dict(*loaded, file.path);
  const auto x = torch::randn({7, 8});
  CHECK(torch::equal(saved(x), loaded(x)));
  CHECK(torch::equal(saved->router->expert_bias, loaded->router->expert_bias));
}

TEST(state_dicts_are_cast_to_the_module) {
  const File file("fastmoe_cpp_cast.pt");
  MoE saved(MoEOptions(8, 6, 4)), loaded(MoEOptions(8, 6, 4));
  loaded->to(torch::kDouble);
  fastmoe_cpp::save_state_dict(*saved, file.path);
  fastmoe_cpp::load_state_dict(*loaded, file.path);
  CHECK_EQUAL(loaded->experts->down_proj.scalar_type(), torch::kDouble);
  CHECK(torch::equal(loaded->experts->down_proj, saved->experts->down_proj.to(torch::kDouble)));
}

TEST(state_dicts_that_do_not_fit_leave_the_module_unchanged) {
  const File file("fastmoe_cpp_other.pt");
  MoE layer(MoEOptions(8, 6, 4));
  const auto before = layer->router->weight.clone();
  const auto load = [&](const MoEOptions& of) {
    fastmoe_cpp::save_state_dict(*MoE(of), file.path);
    fastmoe_cpp::load_state_dict(*layer, file.path);
  };
  CHECK_THROWS(c10::ValueError, load(MoEOptions(8, 7, 4)), "experts.", "must have shape", "[4, 14, 8]");
  CHECK_THROWS(c10::ValueError, load(MoEOptions(8, 6, 4).bias(true)), "has 'experts.");
  CHECK_THROWS(c10::ValueError, fastmoe_cpp::load_state_dict(*layer, file.path + ".none"), "cannot be read");
  CHECK_THROWS(c10::ValueError, fastmoe_cpp::save_state_dict(*layer, file.path + "/none"), "can be written");
  std::ofstream(file.path) << "not a state dict";
  CHECK_THROWS(c10::ValueError, fastmoe_cpp::load_state_dict(*layer, file.path), "must hold");
  MoE with_bias(MoEOptions(8, 6, 4).bias(true));
  fastmoe_cpp::save_state_dict(*layer, file.path);
  CHECK_THROWS(c10::ValueError, fastmoe_cpp::load_state_dict(*with_bias, file.path), "lacks 'experts.");
  CHECK(torch::equal(layer->router->weight, before));
}

// Run by test_cpp.py between two halves in Python: loads what Python saved, and saves its own answer.
TEST(answers_python) {
  const char* folder = std::getenv("FASTMOE_CPP_EXCHANGE");
  if (folder == nullptr) return;
  const std::string path = folder;
  MoE layer(options());
  fastmoe_cpp::load_state_dict(*layer, path + "/python.pt");
  std::ifstream file(path + "/x.pt", std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const auto y = layer(torch::pickle_load(bytes).toTensor());
  const auto answer = torch::pickle_save(y.detach());
  std::ofstream(path + "/y.pt", std::ios::binary).write(answer.data(), static_cast<std::streamsize>(answer.size()));
  torch::NoGradGuard guard;
  for (auto& p : layer->parameters()) p.add_(0.125);
  fastmoe_cpp::save_state_dict(*layer, path + "/cpp.pt");
}
