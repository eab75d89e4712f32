// Matrix-vector kernels for a forward pass of few tokens, where reading the chosen experts' weights is all the work. No
// torch and no tiles: each warp multiplies a few rows of a weight at a time by the few rows of slots that its expert has.
#pragma once
#include <string>

#include "../experts.h"

namespace fastmoe_cpp::cuda::gemv {

// A layer's forward pass runs here up to so many tokens, which an expert's weight meets at once, and so many products,
// slots * H * I: of a longer pass tiles lose less at its ends than these kernels on the way.
inline constexpr int64_t kMaxTokens = 4;
inline constexpr int64_t kMaxProducts = 1 << 26;

inline constexpr int kThreads = 256;
inline constexpr int kResident = 3;      // blocks on a multiprocessor
inline constexpr int kRingChunks = 16;   // of 16 bytes a thread: what it has of weights in shared memory
inline constexpr int kMaxListed = 1024;  // experts with slots, listed in shared memory

enum class Product : int { up, down };

// Rows of the weight that a warp multiplies together: a gate row and its up row, or neighbours.
constexpr int rows_a_warp(Product product) { return product == Product::up ? 2 : 4; }

bool supports(const ExpertShape&);  // dtype, sizes; operands must also start on 16-byte boundaries

cudaError_t up(const UpParams&, cudaStream_t);
// follows_up: the launch before this one in the stream is up() of the same plan. down may then read the plan and the
// weights before up has ended.
cudaError_t down(const DownParams&, bool follows_up, cudaStream_t);

std::string explain(Product, const ExpertShape&, int multiprocessors);  // one line

}  // namespace fastmoe_cpp::cuda::gemv
