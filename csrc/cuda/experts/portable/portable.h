// What this path offers beside the launches of experts.h: scratch memory of the caller's, the grouped linear layer, and
// the descriptions of its products.
#pragma once
#include "../experts.h"
#include "config.h"

namespace fastmoe_cpp::cuda::portable {

// act_grad sums <dA, A> a tile at a time into scratch memory, then over the tiles in order. The launch without scratch
// takes it from the device's stream-ordered pool.
int64_t act_grad_scratch_bytes(const ActGradParams&);
cudaError_t act_grad(const ActGradParams&, void* scratch, cudaStream_t);

// out[s] = rows[s] @ weight[e].T + bias[e] for the slots of expert e; rows past expert_offsets[E] become zeros.
struct GroupedLinear {
  DType dtype;
  int64_t slots, in, out;
  int experts;
  const int32_t* expert_offsets;  // [E + 1]
};
// [S, in], [E, out, in], [E, out] or null -> [S, out]
cudaError_t grouped_linear(const GroupedLinear&, const void* rows, const void* weight, const void* bias, void* out,
                           cudaStream_t);
// [S, out], [E, out, in] -> [S, in]
cudaError_t grouped_linear_input_grad(const GroupedLinear&, const void* grad_output, const void* weight,
                                      void* grad_rows, cudaStream_t);
// [S, out], [S, in] -> [E, out, in], [E, out]; either may be null
cudaError_t grouped_linear_weight_grad(const GroupedLinear&, const void* grad_output, const void* rows,
                                       void* grad_weight, void* grad_bias, cudaStream_t);

// The product behind a launch of experts.h.
enum class Launch : int { up, down, act_grad, input_grad, gate_up_weight_grad, down_weight_grad };
Product product_of(Launch, const ExpertShape&, bool vectorised);
bool vectorised(const ExpertShape&);  // as far as sizes go

#ifdef FASTMOE_PORTABLE_TUNE
extern int forced_tiling;  // a Tiling, or -1; for benchmarks that compare tilings
#endif

}  // namespace fastmoe_cpp::cuda::portable
