// What a layer's products run with on a GPU, and why, in words.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fastmoe_cpp::cuda {

// What the choices know of a GPU: 10 * major + minor, its multiprocessors, the shared memory that a block may ask for.
struct DeviceFacts {
  int capability, multiprocessors;
  int64_t shared_bytes;
};

// One line for the path, then one for each of the six products. dtype is "float64", "float32", "bfloat16" or "float16";
// wish as in choose_path. Needs no GPU.
std::vector<std::string> explain_experts(std::string_view dtype, int64_t tokens, int64_t hidden, int64_t intermediate,
                                         int64_t experts, int64_t top_k, std::string_view activation,
                                         const DeviceFacts& device, std::string_view wish);

}  // namespace fastmoe_cpp::cuda
