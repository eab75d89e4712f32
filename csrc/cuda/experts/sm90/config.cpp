#include "config.h"

#include <algorithm>

namespace fastmoe_cpp::cuda::sm90 {

#ifdef FASTMOE_SM90_TUNE
int forced_tiling[6] = {-1, -1, -1, -1, -1, -1};
#endif

namespace {

// Slots of an expert where the slots spread evenly; what is known before the device has counted them.
int64_t rows_an_expert(const ExpertShape& shape) {
  return shape.slots() / std::max<int64_t>(1, std::min<int64_t>(shape.experts, shape.slots()));
}

Tiling choose(Product product, const ExpertShape& shape) {
#ifdef FASTMOE_SM90_TUNE
  if (const int forced = forced_tiling[static_cast<int>(product)]; forced >= 0) return static_cast<Tiling>(forced);
#endif
  switch (product) {
    case Product::up: return rows_an_expert(shape) <= 32 ? Tiling::narrow : Tiling::cooperative;
    case Product::down:
      if (rows_an_expert(shape) <= 32) return Tiling::narrow;
      return shape.intermediate <= 1024 ? Tiling::wide : Tiling::cooperative;
    case Product::input_grad: return shape.intermediate <= 256 ? Tiling::wide : Tiling::cooperative;
    default: return Tiling::cooperative;
  }
}

const char* name_of(Product product) {
  constexpr const char* kNames[] = {"up", "down", "act_grad", "input_grad", "gate_up_weight_grad", "down_weight_grad"};
  return kNames[static_cast<int>(product)];
}

}  // namespace

Configuration configure(Product product, const ExpertShape& shape) {
  switch (choose(product, shape)) {
    case Tiling::narrow: return {Tiling::narrow, 64, 64};
    case Tiling::square: return {Tiling::square, 128, 128};
    case Tiling::wide: return {Tiling::wide, 128, 192};
    default: return {Tiling::cooperative, 128, 256};
  }
}

std::string explain(Product product, const ExpertShape& shape) {
  constexpr const char* kTilings[] = {"ping-pong", "ping-pong", "ping-pong", "cooperative"};
  const Configuration c = configure(product, shape);
  return std::string(name_of(product)) + ": " + std::to_string(c.tile_rows) + "x" + std::to_string(c.tile_columns) +
         " " + kTilings[static_cast<int>(c.tiling)] + ", " + std::to_string(rows_an_expert(shape)) + " rows an expert";
}

}  // namespace fastmoe_cpp::cuda::sm90
