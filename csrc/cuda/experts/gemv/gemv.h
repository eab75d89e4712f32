// Matrix-vector kernels for a forward pass of few tokens, where reading the chosen experts' weights is all the work. No
// torch and no tiles: each warp multiplies a few rows of a weight at a time by the few rows of slots that its expert has.
#pragma once
#include <string>

#include "../experts.h"

namespace fastmoe_cpp::cuda::gemv {

// A layer's forward pass runs here up to so many tokens, which an expert's weight meets at once; above kMostlyAlone only with
// at most 3 slots for 2 experts, because with 3 or 4 slots an expert its products take longer than reading its weights.
inline constexpr int64_t kMaxTokens = 4;
inline constexpr int64_t kMostlyAlone = 2;

inline constexpr int kThreads = 256;
inline constexpr int kResident = 3;      // blocks on a multiprocessor
inline constexpr int kRingChunks = 16;   // of 16 bytes a thread: what it has of weights in shared memory
inline constexpr int kMaxListed = 1024;  // experts with slots, listed in shared memory

enum class Product : int { up, down };

// Rows of the weight that a warp multiplies together: a gate row and its up row, or neighbours.
constexpr int rows_a_warp(Product product) { return product == Product::up ? 2 : 4; }

bool supports(const ExpertShape&);  // dtype, sizes; operands must also start on 16-byte boundaries
bool combines(const ExpertShape&);  // whether combined_down() is for this shape

cudaError_t up(const UpParams&, cudaStream_t);
// follows_up: the launch before this one in the stream is up() of the same plan. down may then read the plan and the
// weights before up has ended.
cudaError_t down(const DownParams&, bool follows_up, cudaStream_t);
// down and combine in one launch, for one token and shapes that combines() takes: its rows meet in a block's shared memory,
// and out [1, H] gets the bits that combine would make of p.rows, which is not used. weighted: rows are multiplied with the
// plan's weights.
cudaError_t combined_down(const DownParams& p, bool weighted, void* out, bool follows_up, cudaStream_t);

std::string explain(Product, const ExpertShape&, int multiprocessors);  // one line

}  // namespace fastmoe_cpp::cuda::gemv
