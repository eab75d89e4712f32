#include "config.h"

#include <algorithm>

namespace fastmoe_cpp::cuda::portable {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_half(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

// Slots of an expert where they spread evenly: what is known before the device has counted them.
int64_t rows_an_expert(const Product& p) {
  return p.slots / std::max<int64_t>(1, std::min<int64_t>(p.experts, p.slots));
}

Tiling choose(const Product& p, const Device& device) {
  if (!is_half(p.dtype) || !p.vectorised) return Tiling::medium;
  const bool forward = p.kind == Kind::up || p.kind == Kind::linear;
  if (forward && rows_an_expert(p) <= 8) return Tiling::small;
  const bool roomy = device.shared_bytes >= 160 * 1024;
  const int64_t columns = p.columns * (p.kind == Kind::up && p.gated ? 2 : 1);
  if (!roomy || columns <= 64) return Tiling::medium;
  if (p.kind == Kind::weight_grad) return p.rows <= 64 ? Tiling::medium : Tiling::large;
  return rows_an_expert(p) <= 64 ? Tiling::medium : Tiling::large;
}

struct Size {
  int rows, columns, threads, ctas_per_sm, max_stages;
};

Size size_of(Tiling tiling, DType dtype) {
  switch (tiling) {
    case Tiling::small: return {16, 64, 128, 4, 5};
    case Tiling::pair: return {128, 128, 128, 2, 3};
    case Tiling::large: return {128, 256, 256, 1, 4};
    default: return is_half(dtype) ? Size{64, 128, 128, 3, 3} : Size{dtype == DType::f32 ? 64 : 32, 128, 128, 2, 3};
  }
}

}  // namespace

Configuration configure(const Product& p, const Device& device, int forced) {
  const Tiling tiling = forced < 0 ? choose(p, device) : static_cast<Tiling>(forced);
  const Size size = size_of(tiling, p.dtype);
  Configuration c{tiling, size.rows, size.columns, size.threads, size.ctas_per_sm, 2, 0, 0, 0};

  // A stage holds 128 bytes of the contraction for every row and column (and a scale for each element of it); the plan
  // takes two ints an expert.
  const int64_t stage = 128 * int64_t{c.tile_rows + c.tile_columns} + (p.kind == Kind::weight_grad ? 256 : 0);
  const int64_t plan = 8 * (int64_t{p.experts} + 1);
  while (c.ctas_per_sm > 1 && (2 * stage + plan + 1024) * c.ctas_per_sm > device.shared_bytes) --c.ctas_per_sm;
  const int64_t room = device.shared_bytes / c.ctas_per_sm - plan - (c.ctas_per_sm > 1 ? 1024 : 0);
  c.stages = static_cast<int>(std::clamp<int64_t>(room / stage, 2, size.max_stages));
  c.shared_bytes = c.stages * stage + plan;

  const int64_t tile_columns = p.kind == Kind::up && p.gated ? c.tile_columns / 2 : c.tile_columns;
  const int64_t row_tiles = p.kind == Kind::weight_grad ? p.experts * ceil_div(p.rows, c.tile_rows)
                                                        : p.slots / c.tile_rows + std::min<int64_t>(p.experts, p.slots);
  c.tiles = row_tiles * ceil_div(p.columns, tile_columns);
  c.grid = std::min<int64_t>(c.tiles, int64_t{device.multiprocessors} * c.ctas_per_sm);
  return c;
}

Configuration configure(const Product& p, const Device& device) { return configure(p, device, -1); }

std::string explain(const Product& p, const Device& device) {
  constexpr const char* kKinds[] = {"up", "linear", "act_grad", "linear_grad", "weight_grad"};
  const Configuration c = configure(p, device);
  return std::string(kKinds[static_cast<int>(p.kind)]) + ": " + std::to_string(c.tile_rows) + "x" +
         std::to_string(c.tile_columns) + " tiles of " + std::to_string(c.threads) + " threads, " +
         std::to_string(c.stages) + " stages, " + std::to_string(c.ctas_per_sm) + " an SM, " +
         (p.vectorised ? "16-byte accesses" : "element-wise accesses") + ", " + std::to_string(rows_an_expert(p)) +
         " rows an expert";
}

}  // namespace fastmoe_cpp::cuda::portable
