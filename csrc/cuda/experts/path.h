// Which kernels compute a layer: pure functions of what is known before the launch, and their reasons.
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

struct GemvChoice {
  bool taken;
  std::string reason;
};

// Whether matrix-vector kernels compute up and down in place of the path's, forward and where backward computes the
// pre-activation again. aligned: of the operands of forward alone, so that both choose the same and get the same bits.
GemvChoice choose_gemv(const ExpertShape& shape, int capability, bool aligned, std::string_view wish);

}  // namespace fastmoe_cpp::cuda
