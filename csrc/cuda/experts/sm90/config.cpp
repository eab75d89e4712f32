#include "config.h"

#include <algorithm>

namespace fastmoe_cpp::cuda::sm90 {

namespace {

// Slots of an expert where the slots spread evenly; what is known before the device has counted them.
int64_t rows_an_expert(const ExpertShape& shape) {
  return shape.slots() / std::max<int64_t>(1, std::min<int64_t>(shape.experts, shape.slots()));
}

Tiling choose(Product product, const ExpertShape& shape) {
  const bool decodes = product == Product::up || product == Product::down;
  return decodes && rows_an_expert(shape) <= 32 ? Tiling::narrow : Tiling::cooperative;
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
  return std::string(name_of(product)) + ": " + tile +
         (c.tiling == Tiling::narrow ? " ping-pong, "
                                     : " cooperative, clusters of " + std::to_string(c.cluster) + ", ") +
         rows;
}

}  // namespace fastmoe_cpp::cuda::sm90
