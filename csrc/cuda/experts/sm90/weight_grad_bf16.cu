#include "weight_grad.cuh"

namespace fastmoe_cpp::cuda::sm90 {
template cudaError_t launch_gate_up_weight_grad<__nv_bfloat16>(const WeightGradParams&, cudaStream_t);
template cudaError_t launch_down_weight_grad<__nv_bfloat16>(const WeightGradParams&, cudaStream_t);
}  // namespace fastmoe_cpp::cuda::sm90
