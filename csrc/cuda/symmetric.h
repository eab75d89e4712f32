// Rows between GPUs that load from and store to each other's memory. No torch here: pointers, sizes, a stream.
// What a workspace holds, and why one barrier an operation is enough, is in ../symmetric.h. Launches of one operation, in
// order: stage, barrier, pull; or push, barrier, sum.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../symmetric.h"
#include "experts/experts.h"  // DType

namespace fastmoe_cpp::cuda {

struct SymmetricGroup {
  symmetric::Space space;
  const int64_t* peers;  // [W] on the device: the address of each rank's workspace
  char name[64];         // of the operation, for messages
};

// ids, ranks and pairs as torch.ops.fastmoe_cpp_symmetric.token_ranks; pairs [W] must be zero.
struct TokenRanksParams {
  int64_t tokens;
  int top_k, experts, each, ranks;
  const int32_t *token_slot, *expert_offsets;  // [T, K], [E + 1]
  int32_t *ids, *to, *pairs;                   // [T, K], [T, J], [W]
};
cudaError_t token_ranks(const TokenRanksParams&, cudaStream_t);

// Copies what the other ranks will read into this rank's half.
struct StageParams {
  SymmetricGroup group;
  int64_t tokens, slots, row_bytes, weight_bytes;
  const void *x, *weights;                            // [T, H]; [T, K] or null
  const int32_t *ids, *slot_index, *offsets, *pairs;  // [T, K] or null, [S], [W + 1], [W]
};
cudaError_t stage(const StageParams&, cudaStream_t);

// Waits until every rank is here; then writes the layout (ops/symmetric.h) unless it is null. A rank that does not come in
// time, rows of other sizes and more than max_rows rows (where that is not negative) end the kernel: one sentence, a trap.
struct BarrierParams {
  SymmetricGroup group;
  int32_t* layout;
  int64_t max_rows, row_bytes;
};
cudaError_t barrier(const BarrierParams&, cudaStream_t);

// Row r of the layout from its rank; zeros and ids of -1 behind the last.
struct PullParams {
  SymmetricGroup group;
  int64_t rows, row_bytes, weight_bytes;
  const int32_t* layout;
  void *out, *weights;  // [R, H]; [R, K] or null
  int32_t* ids;         // [R, K] or null
};
cudaError_t pull(const PullParams&, cudaStream_t);

// Row r of the layout back to its rank, into its slot there.
struct PushParams {
  SymmetricGroup group;
  int64_t rows, row_bytes, weight_bytes;
  const int32_t* layout;
  const void *from, *weights;  // [R, H]; [R, K] or null
};
cudaError_t push(const PushParams&, cudaStream_t);

// sums[t] = the sum over j, in order, of the pushed rows token_slot[t, j], in float32 (float64 for f64); likewise weights.
struct SumParams {
  SymmetricGroup group;
  DType dtype;
  int64_t tokens, hidden, row_bytes;
  const int32_t* token_slot;  // [T, J]
  void *sums, *weights;       // [T, H]; [T, K] or null
};
cudaError_t sum(const SumParams&, cudaStream_t);

}  // namespace fastmoe_cpp::cuda
