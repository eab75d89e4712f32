// When the matrix-vector kernels compute a forward pass.
#include "cuda/experts/gemv/gemv.h"
#include "cuda/experts/path.h"
#include "test.h"

namespace {

using fastmoe_cpp::Activation;
using fastmoe_cpp::cuda::choose_gemv;
using fastmoe_cpp::cuda::DType;
using fastmoe_cpp::cuda::ExpertShape;
using namespace fastmoe_cpp::cuda::gemv;

ExpertShape shape_of(int64_t tokens, int64_t hidden = 2048, int64_t intermediate = 768, int experts = 128,
                     int top_k = 8) {
  return {DType::bf16,        tokens, hidden, intermediate, experts, top_k,
          Activation::SwiGLU, 1.702f, 7.0f,   false,        false,   tokens * top_k};
}

bool is_taken(const ExpertShape& shape) { return choose_gemv(shape, 90, true, "").taken; }

}  // namespace

TEST(gemv_is_for_few_tokens) {
  for (int64_t tokens = 1; tokens <= kMaxTokens; ++tokens) CHECK(is_taken(shape_of(tokens)));
  for (int64_t tokens : {kMaxTokens + 1, int64_t{64}, int64_t{40960}}) CHECK(!is_taken(shape_of(tokens)));
}

TEST(gemv_is_for_experts_with_few_tokens) {
  // Mixtral's and DeepSeek-V3's layers
  for (int64_t tokens : {1, 2, 3, 4}) CHECK(is_taken(shape_of(tokens, 4096, 14336, 8, 2)));
  for (int64_t tokens : {1, 2, 3, 4}) CHECK(is_taken(shape_of(tokens, 7168, 2048, 256, 8)));
  // 12 slots: at most 3 for 2 experts
  CHECK(is_taken(shape_of(3, 64, 64, 8, 4)) && !is_taken(shape_of(3, 64, 64, 7, 4)));
  CHECK(is_taken(shape_of(4, 64, 64, 8, 3)) && !is_taken(shape_of(4, 64, 64, 7, 3)));
  for (int64_t tokens : {1, 2})
    CHECK(is_taken(shape_of(tokens, 64, 64, 1, 1)) && is_taken(shape_of(tokens, 64, 64, 7, 7)));
  CHECK(!is_taken(shape_of(4, int64_t{1} << 40, int64_t{1} << 40, 64, 8)));
}

TEST(gemv_combines_one_token_whose_experts_share_a_block) {
  for (int top_k : {1, 2, 4, 8}) CHECK(combines(shape_of(1, 2048, 768, 128, top_k)));
  for (int top_k : {0, 3, 5, 6, 7, 9, 10, 16, 128}) CHECK(!combines(shape_of(1, 2048, 768, 128, top_k)));
  for (int64_t tokens : {0, 2, 4}) CHECK(!combines(shape_of(tokens, 2048, 768, 128, 2)));
  auto padded = shape_of(1);
  padded.plan_slots += 8;
  CHECK(!combines(padded));
  auto dropped = shape_of(2);  // as many slots as one token has
  dropped.plan_slots = 8;
  CHECK(!combines(dropped));
  CHECK(!combines(shape_of(1, 2044, 768)));
  CHECK(combines(shape_of(1, 1 << 26, 768, 1, 8)) && !combines(shape_of(1, 1 << 27, 768, 1, 8)));
  CHECK(explain(Product::down, shape_of(1), 132).find("combine") != std::string::npos);
  CHECK(explain(Product::down, shape_of(2), 132).find("combine") == std::string::npos);
  CHECK(explain(Product::up, shape_of(1), 132).find("combine") == std::string::npos);
}

TEST(gemv_needs_16_bits_and_sizes_that_are_multiples_of_8) {
  for (int64_t size : {8, 24, 264, 2048, 14336}) {
    CHECK(is_taken(shape_of(1, size, 768, 8, 2)));
    CHECK(is_taken(shape_of(1, 2048, size, 8, 2)));
  }
  for (int64_t size : {0, 1, 4, 12, 129}) {
    CHECK(!is_taken(shape_of(1, size, 768)));
    CHECK(!is_taken(shape_of(1, 2048, size)));
  }
  for (DType dtype : {DType::f64, DType::f32, DType::f16}) {
    auto shape = shape_of(1);
    shape.dtype = dtype;
    CHECK(is_taken(shape) == (dtype == DType::f16));
  }
}

TEST(gemv_takes_every_activation_and_number_of_experts) {
  for (int a = 0; a < static_cast<int>(Activation::Count); ++a) {
    auto shape = shape_of(1);
    shape.activation = static_cast<Activation>(a);
    CHECK(is_taken(shape));
  }
  for (int experts : {1, 2, 257, 1024})
    for (int top_k : {1, experts}) CHECK(is_taken(shape_of(kMostlyAlone, 64, 64, experts, top_k)));
}

TEST(gemv_items_are_counted_in_an_int) {
  CHECK(!supports(shape_of(1, int64_t{1} << 28, 768, 8, 4)));
  CHECK(supports(shape_of(1, int64_t{1} << 28, 768, 8, 3)));
}

TEST(gemv_follows_the_device_the_operands_and_the_wish) {
  const auto shape = shape_of(1);
  for (int capability : {80, 86, 89, 90, 100}) CHECK(choose_gemv(shape, capability, true, "").taken);
  CHECK(!choose_gemv(shape, 75, true, "").taken);
  CHECK(!choose_gemv(shape, 90, false, "").taken);
  CHECK(!choose_gemv(shape, 90, true, "portable").taken);
}

TEST(gemv_choice_is_explained) {
  const std::string limit = std::to_string(kMaxTokens) + " tokens";
  CHECK(choose_gemv(shape_of(1), 90, true, "").reason == "at most " + limit);
  CHECK(choose_gemv(shape_of(4, 64, 64, 8, 8), 90, true, "").reason.find("3 slots for 2 experts") != std::string::npos);
  CHECK(choose_gemv(shape_of(kMaxTokens + 1), 90, true, "").reason == "more than " + limit);
  for (Product product : {Product::up, Product::down}) {
    const auto words = explain(product, shape_of(1), 132);
    CHECK(words.find(std::to_string(rows_a_warp(product)) + " ") != std::string::npos);
    CHECK(words.find(std::to_string(kResident * 132) + " blocks") != std::string::npos);
  }
  auto ungated = shape_of(1);
  ungated.activation = Activation::GELU;
  CHECK(explain(Product::up, shape_of(1), 132).find("gate and up") != std::string::npos);
  CHECK(explain(Product::up, ungated, 132).find("gate and up") == std::string::npos);
}
