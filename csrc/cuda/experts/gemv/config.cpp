#include <algorithm>

#include "gemv.h"

namespace fastmoe_cpp::cuda::gemv {

bool supports(const ExpertShape& shape) {
  const int64_t h = shape.hidden, i = shape.intermediate, listed = std::min<int64_t>(shape.experts, shape.slots());
  return (shape.dtype == DType::bf16 || shape.dtype == DType::f16) && h > 0 && i > 0 && h % 8 == 0 && i % 8 == 0 &&
         listed <= kMaxListed && std::max(h, i) < int64_t{1} << 30 &&
         listed * std::max(h, i) < int64_t{1} << 30;  // items are counted in an int, with a step of the grid to spare
}

// A warp for each slot of a group of columns, and whole groups in a block. Of several tokens the experts may be fewer than
// the slots, and warps would stay idle.
bool combines(const ExpertShape& shape) {
  return supports(shape) && shape.tokens == 1 && shape.slots() == shape.top_k && shape.top_k > 0 &&
         kThreads / 32 % shape.top_k == 0 &&
         shape.top_k * shape.hidden < int64_t{1} << 30;  // counted as above, even where experts are fewer than K
}

std::string explain(Product product, const ExpertShape& shape, int multiprocessors) {
  const bool gated_up = product == Product::up && is_gated(shape.activation);
  return std::string(product == Product::up ? "up" : "down") + ": matrix-vector, a warp streams " +
         std::to_string(rows_a_warp(product)) + (gated_up ? " rows (gate and up)" : " neighbouring rows") +
         " of the weight at a time, " + (product == Product::down && combines(shape) ? "combines in the block, " : "") +
         "at most " + std::to_string(kResident * multiprocessors) + " blocks of " + std::to_string(kThreads) +
         " threads";
}

}  // namespace fastmoe_cpp::cuda::gemv
