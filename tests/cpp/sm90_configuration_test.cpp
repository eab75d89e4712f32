// Tiles of the Hopper path.
#include "cuda/experts/sm90/config.h"
#include "test.h"

namespace {

using fastmoe_cpp::Activation;
using fastmoe_cpp::cuda::DType;
using fastmoe_cpp::cuda::ExpertShape;
using namespace fastmoe_cpp::cuda::sm90;

constexpr Product kProducts[] = {Product::up,
                                 Product::down,
                                 Product::act_grad,
                                 Product::input_grad,
                                 Product::gate_up_weight_grad,
                                 Product::down_weight_grad};

ExpertShape shape_of(int64_t tokens, int64_t hidden, int64_t intermediate, int experts, int top_k) {
  return {DType::bf16,        tokens, hidden, intermediate, experts, top_k,
          Activation::SwiGLU, 1.702f, 7.0f,   false,        false,   tokens * top_k};
}

}  // namespace

TEST(sm90_tiles_are_multiples_of_the_matrix_instruction) {
  for (Product product : kProducts)
    for (int64_t tokens : {0, 1, 16, 4096, 40960})
      for (int64_t size : {64, 256, 768, 1024, 2048, 14336})
        for (int experts : {1, 8, 128, 1024}) {
          const auto c = configure(product, shape_of(tokens, 2048, size, experts, 1));
          CHECK(c.tile_rows % 64 == 0 && c.tile_rows <= 256);
          CHECK(c.tile_columns % 8 == 0 && c.tile_columns <= 256);
        }
}

TEST(sm90_decode_takes_narrow_tiles_and_training_does_not) {
  const auto decode = shape_of(16, 2048, 768, 128, 8), training = shape_of(16384, 2048, 768, 128, 8);
  for (Product product : {Product::up, Product::down}) {
    CHECK(configure(product, decode).tiling == Tiling::narrow);
    CHECK(configure(product, training).tiling != Tiling::narrow);
    CHECK(configure(product, training).tile_columns > configure(product, decode).tile_columns);
  }
}

TEST(sm90_choice_is_explained) {
  for (Product product : kProducts) {
    const auto shape = shape_of(8192, 4096, 14336, 8, 2);
    const auto c = configure(product, shape);
    const auto words = explain(product, shape);
    CHECK(words.find(std::to_string(c.tile_rows) + "x" + std::to_string(c.tile_columns)) != std::string::npos);
    CHECK(words.find("2048 rows an expert") != std::string::npos);
  }
}
