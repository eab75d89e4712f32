#include "config.h"

#include <algorithm>

namespace fastmoe_cpp::cuda::sm90 {

namespace {

// Slots of an expert where the slots spread evenly; what is known before the device has counted them.
int64_t rows_an_expert(const ExpertShape& shape) {
  return shape.slots() / std::max<int64_t>(1, std::min<int64_t>(shape.experts, shape.slots()));
}

// Up to so many, up and down are bound by reading weights, and take narrow tiles.
constexpr int64_t kFewRows = 32;

bool has_narrow_tiles(Product product) { return product == Product::up || product == Product::down; }

Tiling choose(Product product, const ExpertShape& shape) {
  return has_narrow_tiles(product) && rows_an_expert(shape) <= kFewRows ? Tiling::narrow : Tiling::cooperative;
}

const char* name_of(Product product) {
  constexpr const char* kNames[] = {"up", "down", "act_grad", "input_grad", "gate_up_weight_grad", "down_weight_grad"};
  return kNames[static_cast<int>(product)];
}

}  // namespace

Configuration configure(Product product, const ExpertShape& shape) {
  if (choose(product, shape) == Tiling::narrow) return {Tiling::narrow, 64, 64, 1};
  return {Tiling::cooperative, 128, 256, 2};
}

std::string explain(Product product, const ExpertShape& shape) {
  const Configuration c = configure(product, shape);
  const std::string rows = std::to_string(rows_an_expert(shape)) + " rows an expert";
  const std::string tile = std::to_string(c.tile_rows) + "x" + std::to_string(c.tile_columns);
  const std::string words =
      std::string(name_of(product)) + ": " + tile +
      (c.tiling == Tiling::narrow ? " ping-pong, " : " cooperative, clusters of " + std::to_string(c.cluster) + ", ");
  if (product == Product::gate_up_weight_grad || product == Product::down_weight_grad)
    return words + "sums over " + rows + "; tiles of uneven experts are claimed from a counter";
  if (!has_narrow_tiles(product)) return words + rows + "; this product has no other tiles";
  return words + rows + (c.tiling == Tiling::narrow ? ", at most " : ", more than ") + std::to_string(kFewRows);
}

}  // namespace fastmoe_cpp::cuda::sm90
