// Which of the two GPU paths computes a layer: a pure function of what is known before the launch, and its reason.
#pragma once
#include <string>
#include <string_view>

#include "experts.h"

namespace fastmoe_cpp::cuda {

enum class Path : int { portable, hopper };

struct PathChoice {
  Path path;
  std::string reason;
};

// capability: 10 * major + minor of the device. aligned: every operand starts on a 16-byte boundary. wish: what the
// environment variable FASTMOE_CPP_PATH asks for, "" or "portable".
PathChoice choose_path(const ExpertShape& shape, int capability, bool aligned, std::string_view wish);

}  // namespace fastmoe_cpp::cuda
