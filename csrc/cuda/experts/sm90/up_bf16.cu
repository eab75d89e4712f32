#include "up.cuh"

namespace fastmoe_cpp::cuda::sm90 {
template cudaError_t launch_up<__nv_bfloat16>(const UpParams&, cudaStream_t);
}  // namespace fastmoe_cpp::cuda::sm90
