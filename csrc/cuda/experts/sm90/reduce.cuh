// The small sums beside the GEMMs: routing weights' gradient from partial sums, bias gradients.
#pragma once
#include "../experts.h"

namespace fastmoe_cpp::cuda::sm90 {

// grad_weight[s] = sum over n_tiles of partial[., s], in order (+ <grad_output[token(s)], down_bias[e]>); 0 for slots
// of nobody.
template <typename T>
cudaError_t launch_weight_dot(const ActGradParams&, const float* partial, int n_tiles, cudaStream_t);

// grad_bias[e] = sum over the expert's slots of left[row(s)] * scale(s), in a fixed order. `gathered`: row(s) is the
// slot's token, otherwise the slot; `scale` [T, K] or null.
template <typename T>
cudaError_t launch_bias_grad(const ExpertShape&, const Plan&, const void* left, int64_t columns, bool gathered,
                             const float* scale, bool interleaved, void* grad_bias, cudaStream_t);

}  // namespace fastmoe_cpp::cuda::sm90
