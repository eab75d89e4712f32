#include "act_grad.cuh"

namespace fastmoe_cpp::cuda::sm90 {
template cudaError_t launch_act_grad<__nv_bfloat16>(const ActGradParams&, float*, cudaStream_t);
}  // namespace fastmoe_cpp::cuda::sm90
