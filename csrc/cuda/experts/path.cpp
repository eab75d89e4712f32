#include "path.h"

#include "gemv/gemv.h"

namespace fastmoe_cpp::cuda {

PathChoice choose_path(const ExpertShape& shape, int capability, bool aligned, std::string_view wish) {
  if (wish == "portable") return {Path::portable, "FASTMOE_CPP_PATH=portable asks for it"};
#ifdef FASTMOE_SM90
  if (capability != 90) return {Path::portable, "the Hopper kernels need compute capability 9.0"};
  if (!aligned) return {Path::portable, "the Hopper kernels need operands on 16-byte boundaries"};
  if (!sm90::supports(shape)) {
    return {Path::portable,
            "the Hopper kernels need bfloat16 or float16, and hidden and intermediate sizes that are "
            "multiples of 8"};
  }
  return {Path::hopper, "compute capability 9.0, a 16-bit type and sizes that are multiples of 8"};
#else
  (void)shape, (void)capability, (void)aligned;
  return {Path::portable, "built without the Hopper kernels (no 9.0a in TORCH_CUDA_ARCH_LIST)"};
#endif
}

GemvChoice choose_gemv(const ExpertShape& shape, int capability, bool aligned, std::string_view wish) {
  if (wish == "portable") return {false, "FASTMOE_CPP_PATH=portable asks for tiles"};
  if (capability < 80) return {false, "the matrix-vector kernels need compute capability 8.0 or newer"};
  if (!aligned) return {false, "the matrix-vector kernels need operands on 16-byte boundaries"};
  const std::string limit = std::to_string(gemv::kMaxTokens) + " tokens";
  if (shape.tokens > gemv::kMaxTokens) return {false, "more than " + limit};
  if (shape.tokens > gemv::kMostlyAlone && 2 * shape.slots() > 3 * int64_t{shape.experts}) {
    return {false, "more than " + std::to_string(gemv::kMostlyAlone) + " tokens with more than 3 slots for 2 experts"};
  }
  if (!gemv::supports(shape)) {
    return {false,
            "the matrix-vector kernels need bfloat16 or float16, and hidden and intermediate sizes that are multiples "
            "of 8"};
  }
  return {true, "at most " + limit};
}

}  // namespace fastmoe_cpp::cuda
