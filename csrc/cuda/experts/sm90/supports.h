// What the Hopper path takes beyond the launches of experts.h.
#pragma once
#include <cstddef>

#include "../experts.h"

namespace fastmoe_cpp::cuda::sm90 {

// Whether a tensor may be an operand: TMA and 16-byte copies need its data on a 16-byte boundary.
inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// act_grad sums grad_weight from partial sums of column tiles. Given scratch memory of this many bytes (0 where
// grad_weight is null), it allocates nothing; the launch of experts.h takes the scratch from cudaMallocAsync.
size_t act_grad_scratch_bytes(const ActGradParams&);
cudaError_t act_grad(const ActGradParams&, void* scratch, cudaStream_t);

}  // namespace fastmoe_cpp::cuda::sm90
