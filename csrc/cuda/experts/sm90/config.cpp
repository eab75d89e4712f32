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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Below, a launch costs about as much as the sum.
constexpr int64_t kFewSumBytes = int64_t{64} << 20;
// A microsecond, a multiprocessor: bytes of the sum beside tiles, and of the sum alone on the GPU; FLOPs of tiles.
constexpr double kSumRate = 62e3, kSumRateAlone = 20e3, kTileRate = 4.9e6;

}  // namespace

Configuration configure(Product product, const ExpertShape& shape) {
  if (choose(product, shape) == Tiling::narrow) return {Tiling::narrow, 64, 64, 1};
  return {Tiling::cooperative, 128, 256, 2};
}

// The tiles come in rounds: a cluster fewer may cost a round, or nothing. What takes the sum beside the tiles least time is
// taken, if that is less than one after the other.
int sum_blocks(const ExpertShape& shape, int multiprocessors) {
  const int64_t slots = shape.slots(), rows = shape.up_rows(), columns = shape.hidden;
  if (slots * columns * 2 < kFewSumBytes) return 0;
  const Configuration c = configure(Product::gate_up_weight_grad, shape);
  const int64_t tiles = ceil_div(columns, c.tile_rows) * ceil_div(rows, c.tile_columns) * shape.experts;
  const int64_t turns = ceil_div(tiles, c.cluster);
  const double tile_time = 2.0 * slots * rows * columns / turns / (kTileRate * c.cluster);
  const auto time_of_tiles = [&](int blocks) {
    return tile_time * ceil_div(turns, (multiprocessors - blocks) / c.cluster);
  };
  const double bytes = 2.0 * (slots + shape.tokens) * columns, alone = bytes / (kSumRateAlone * multiprocessors);
  int best = 0;
  double least = multiprocessors < 2 * c.cluster ? 0 : alone + time_of_tiles(0);
  for (int blocks = c.cluster; 2 * blocks <= multiprocessors; blocks += c.cluster) {
    const double time = std::max({bytes / (kSumRate * blocks), alone, time_of_tiles(blocks)});
    if (time < least) best = blocks, least = time;
  }
  return best;
}

std::string explain(Product product, const ExpertShape& shape, int multiprocessors) {
  const Configuration c = configure(product, shape);
  const std::string rows = std::to_string(rows_an_expert(shape)) + " rows an expert";
  const std::string tile = std::to_string(c.tile_rows) + "x" + std::to_string(c.tile_columns);
  const std::string words =
      std::string(name_of(product)) + ": " + tile +
      (c.tiling == Tiling::narrow ? " ping-pong, " : " cooperative, clusters of " + std::to_string(c.cluster) + ", ");
  if (product == Product::gate_up_weight_grad || product == Product::down_weight_grad) {
    const std::string tiles = "sums over " + rows + "; tiles of uneven experts are claimed from a counter";
    if (product == Product::down_weight_grad) return words + tiles;
    const int blocks = sum_blocks(shape, multiprocessors);
    if (blocks == 0) return words + tiles + "; the slots' input gradients are summed into tokens before it";
    return words + tiles + "; " + std::to_string(blocks) + " of " + std::to_string(multiprocessors) +
           " multiprocessors sum the slots' input gradients into tokens meanwhile, bound by memory beside tiles that are "
           "not";
  }
  if (!has_narrow_tiles(product)) return words + rows + "; this product has no other tiles";
  return words + rows + (c.tiling == Tiling::narrow ? ", at most " : ", more than ") + std::to_string(kFewRows);
}

}  // namespace fastmoe_cpp::cuda::sm90
