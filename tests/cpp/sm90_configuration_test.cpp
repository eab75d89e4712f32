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

TEST(sm90_input_gradients_are_summed_by_whole_clusters_beside_most_tiles) {
  for (int64_t tokens : {4096, 16384, 40960})
    for (int64_t hidden : {768, 2048, 4096})
      for (int64_t size : {8, 128, 768, 14336})
        for (int experts : {8, 128})
          for (int multiprocessors : {1, 2, 3, 78, 114, 131, 132}) {
            const int blocks = sum_blocks(shape_of(tokens, hidden, size, experts, 8), multiprocessors);
            CHECK(blocks >= 0 && blocks % 2 == 0 && 2 * blocks <= multiprocessors);
          }
}

TEST(sm90_long_rows_of_few_flops_take_more_multiprocessors_to_sum) {
  const auto fine = shape_of(40960, 768, 256, 128, 8), coarse = shape_of(40960, 768, 1024, 32, 2);
  CHECK(sum_blocks(coarse, 132) > 0);
  CHECK(sum_blocks(fine, 132) > sum_blocks(coarse, 132));
  CHECK(sum_blocks(fine, 132) <= 132 / 4);
}

TEST(sm90_few_rows_are_summed_alone) {
  CHECK(sum_blocks(shape_of(0, 2048, 768, 128, 8), 132) == 0);
  CHECK(sum_blocks(shape_of(64, 2048, 768, 128, 8), 132) == 0);
  CHECK(sum_blocks(shape_of(2047, 2048, 768, 128, 8), 132) == 0);  // just below 64 MiB
}

TEST(sm90_sum_beside_tiles_is_explained) {
  const auto sums = shape_of(16384, 2048, 768, 128, 8), alone = shape_of(64, 2048, 768, 128, 8);
  const auto words = explain(Product::gate_up_weight_grad, sums, 132);
  CHECK(words.find(std::to_string(sum_blocks(sums, 132)) + " of 132 multiprocessors sum") != std::string::npos);
  CHECK(explain(Product::gate_up_weight_grad, alone, 132).find("summed into tokens before it") != std::string::npos);
  CHECK(explain(Product::down_weight_grad, sums, 132).find("sum the slots'") == std::string::npos);
}

TEST(sm90_choice_is_explained) {
  for (Product product : kProducts) {
    const auto shape = shape_of(8192, 4096, 14336, 8, 2);
    const auto c = configure(product, shape);
    const auto words = explain(product, shape, 132);
    CHECK(words.find(std::to_string(c.tile_rows) + "x" + std::to_string(c.tile_columns)) != std::string::npos);
    CHECK(words.find("2048 rows an expert") != std::string::npos);
  }
}
