// Tiles of the portable path: whatever the shape and the GPU, they fit its shared memory and cover the product.
#include <algorithm>
#include <random>

#include "cuda/experts/portable/config.h"
#include "test.h"

namespace {

using fastmoe_cpp::cuda::DType;
using namespace fastmoe_cpp::cuda::portable;

// Multiprocessors, and the shared memory one CTA may ask for: A100, RTX 3090, H100, T4-sized and small Orin-like parts.
constexpr Device kDevices[] = {{108, 166912}, {82, 101376}, {132, 232448}, {14, 101376}};
constexpr Kind kKinds[] = {Kind::up, Kind::linear, Kind::act_grad, Kind::linear_grad, Kind::weight_grad};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every kind of product over a spread of sizes; `body(product, device)`.
template <typename Body>
void for_products(Body body) {
  for (const Device& device : kDevices)
    for (Kind kind : kKinds)
      for (DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16})
        for (int experts : {1, 2, 8, 60, 128, 257, 1024})
          for (int64_t slots : {0, 1, 7, 129, 4096, 1 << 20})
            for (int64_t columns : {1, 7, 64, 129, 896, 14336})
              for (bool gated : {false, true})
                for (bool vectorised : {false, true})
                  body(Product{kind, dtype, slots, experts, columns, columns, 768, gated,
                               vectorised && columns % 8 == 0},
                       device);
}

}  // namespace

TEST(portable_tiles_fit_shared_memory) {
  for_products([](const Product& p, const Device& device) {
    const auto c = configure(p, device);
    CHECK(c.stages >= 2 && c.ctas_per_sm >= 1 && c.threads % 32 == 0);
    CHECK(c.shared_bytes > 0 && c.shared_bytes * c.ctas_per_sm <= device.shared_bytes);
  });
}

TEST(portable_grids_are_no_larger_than_the_gpu_and_never_empty_for_work) {
  for_products([](const Product& p, const Device& device) {
    const auto c = configure(p, device);
    CHECK(c.grid <= int64_t{device.multiprocessors} * c.ctas_per_sm && c.grid <= c.tiles);
    CHECK((c.grid > 0) == (p.slots > 0 || p.kind == Kind::weight_grad));
  });
}

TEST(portable_tiles_cover_every_spread_of_slots) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 3000; ++trial) {
    const int experts = 1 + static_cast<int>(random() % 64);
    std::vector<int64_t> sizes(static_cast<size_t>(experts), 0);
    int64_t slots = 0;
    for (auto& size : sizes) slots += size = random() % 3 == 0 ? 0 : static_cast<int64_t>(random() % 500);
    const int64_t columns = 1 + static_cast<int64_t>(random() % 600);
    const Product p{kKinds[random() % 4],
                    random() % 2 ? DType::bf16 : DType::f32,
                    slots,
                    experts,
                    0,
                    columns,
                    64,
                    random() % 2 == 0,
                    random() % 2 == 0};
    const auto c = configure(p, kDevices[random() % 4]);
    int64_t row_tiles = 0;
    for (int64_t size : sizes) row_tiles += ceil_div(size, c.tile_rows);
    const int64_t tile_columns = p.kind == Kind::up && p.gated ? c.tile_columns / 2 : c.tile_columns;
    CHECK(row_tiles * ceil_div(columns, tile_columns) <= c.tiles);
  }
}

TEST(portable_small_tiles_are_for_few_rows_in_16_bits) {
  const Device h100{132, 232448};
  const Product decode{Kind::up, DType::bf16, 64, 128, 0, 768, 2048, true, true};
  CHECK(configure(decode, h100).tile_rows <= 16);
  Product training = decode;
  training.slots = 16384 * 8;
  CHECK(configure(training, h100).tile_rows >= 128);
  for_products([](const Product& p, const Device& device) {
    const auto c = configure(p, device);
    const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
    // the other element sizes and element-wise accesses have one tile each
    if (!half || !p.vectorised) CHECK(c.tiling == Tiling::medium);
  });
}

TEST(portable_forced_tilings_are_taken) {
  const Product p{Kind::linear, DType::f16, 4096, 8, 0, 1024, 512, false, true};
  for (int forced : {0, 1, 2, 3}) CHECK_EQUAL(static_cast<int>(configure(p, {132, 232448}, forced).tiling), forced);
}

TEST(portable_choice_is_explained) {
  const auto words = explain({Kind::act_grad, DType::f32, 4096, 8, 0, 1024, 512, true, false}, {108, 166912});
  for (const char* word : {"act_grad", "64x128", "512 rows an expert"}) CHECK(words.find(word) != std::string::npos);
}
