#include "down.cuh"

namespace fastmoe_cpp::cuda::sm90 {
template cudaError_t launch_down<__half>(const DownParams&, cudaStream_t);
}  // namespace fastmoe_cpp::cuda::sm90
