#include "explain.h"

#include <c10/util/Exception.h>

#include "../../ops/checks.h"
#include "../experts/gemv/gemv.h"
#include "../experts/path.h"
#include "../experts/portable/portable.h"
#ifdef FASTMOE_SM90
#include "../experts/sm90/config.h"
#endif

namespace fastmoe_cpp::cuda {
namespace {

DType dtype_named(std::string_view name) {
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  TORCH_CHECK_VALUE(name == "float16", "dtype must be one of float64, float32, bfloat16, float16, got ", name);
  return DType::f16;
}

constexpr const char* kLaunches[] = {"up", "down", "act_grad", "input_grad", "gate_up_weight_grad", "down_weight_grad"};

}  // namespace

std::vector<std::string> explain_experts(std::string_view dtype, int64_t tokens, int64_t hidden, int64_t intermediate,
                                         int64_t experts, int64_t top_k, std::string_view activation,
                                         const DeviceFacts& device, std::string_view wish) {
  ExpertShape shape{};
  shape.dtype = dtype_named(dtype);
  shape.tokens = tokens;
  shape.hidden = hidden;
  shape.intermediate = intermediate;
  shape.experts = static_cast<int>(experts);
  shape.top_k = static_cast<int>(top_k);
  shape.activation = parse_activation(activation);
  shape.plan_slots = tokens * top_k;
  const PathChoice choice = choose_path(shape, device.capability, /*aligned=*/true, wish);
  const GemvChoice few = choose_gemv(shape, device.capability, /*aligned=*/true, wish);
  std::vector<std::string> lines{(choice.path == Path::hopper ? "Hopper path: " : "portable path: ") + choice.reason +
                                 "; up and down by " + (few.taken ? "matrix-vector kernels: " : "tiles: ") +
                                 few.reason};
  for (int i = 0; i < 6; ++i) {
    if (few.taken && i < 2) {
      lines.push_back(gemv::explain(static_cast<gemv::Product>(i), shape, device.multiprocessors));
      continue;
    }
#ifdef FASTMOE_SM90
    if (choice.path == Path::hopper) {
      lines.push_back(sm90::explain(static_cast<sm90::Product>(i), shape, device.multiprocessors));
      continue;
    }
#endif
    const auto product = portable::product_of(static_cast<portable::Launch>(i), shape, portable::vectorised(shape));
    const std::string words = portable::explain(product, {device.multiprocessors, device.shared_bytes});
    lines.push_back(std::string(kLaunches[i]) + words.substr(words.find(": ")));
  }
  return lines;
}

}  // namespace fastmoe_cpp::cuda
