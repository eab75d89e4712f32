// Symmetric memory: rows between ranks that can load from and store to each other's memory (GPUs on NVLink, or processes
// on the CPU that share memory). Operators of a namespace of their own, torch.ops.fastmoe_cpp_symmetric: they work on
// addresses, one workspace a rank, and are for fastmoe_cpp.parallel alone.
#pragma once
#include <ATen/core/Tensor.h>

#include "../symmetric.h"
#include "checks.h"

namespace fastmoe_cpp::symmetric {

// layout [2 W + 2] int32, what a pull finds out: the first received row of each source rank and their number [W + 1], the
// slot in that rank's own order where its rows for this one begin [W], and the pairs of token and expert among them.
inline int64_t layout_size(int ranks) { return 2 * ranks + 2; }

// `space` as operators take it: rank, K, experts a rank, most tokens a rank, bytes of a half, milliseconds to wait.
Space space_of(const Tensor& peers, at::IntArrayRef space);
int64_t weight_bytes(at::ScalarType type);

// x [T, H], weights [T, K] and ids [T, K] int32 (both or neither), the plan that ops.dispatch made of the ranks [T, J] of
// tokens (slot_index [S], offsets [W + 1]), pairs [W] int32: pairs for each rank.
void check_pull(const Space& space, const Tensor& x, const OptionalTensor& weights, const OptionalTensor& ids,
                const Tensor& slot_index, const Tensor& offsets, const Tensor& pairs, const Tensor& peers);
// rows [R, H], weights [R, K] or none, layout of the pull, token_slot [T, J] of its plan.
void check_push(const Space& space, const Tensor& rows, const OptionalTensor& weights, const Tensor& layout,
                const Tensor& token_slot, const Tensor& peers);
void check_token_ranks(const Tensor& token_slot, const Tensor& expert_offsets, int64_t each, int64_t ranks);

}  // namespace fastmoe_cpp::symmetric
