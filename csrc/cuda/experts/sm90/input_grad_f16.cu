#include "down.cuh"

namespace fastmoe_cpp::cuda::sm90 {
template cudaError_t launch_input_grad<__half>(const InputGradParams&, cudaStream_t);
}  // namespace fastmoe_cpp::cuda::sm90
