#include "up.cuh"

namespace fastmoe_cpp::cuda::sm90 {
template cudaError_t launch_up<__half>(const UpParams&, cudaStream_t);
}  // namespace fastmoe_cpp::cuda::sm90
