#include "down.cuh"

namespace fastmoe_cpp::cuda::sm90 {
template cudaError_t launch_down<__nv_bfloat16>(const DownParams&, cudaStream_t);
}  // namespace fastmoe_cpp::cuda::sm90
