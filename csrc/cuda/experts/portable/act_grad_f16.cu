#include "launch.cuh"

namespace fastmoe_cpp::cuda::portable {
template cudaError_t launch<Kind::act_grad, __half>(const Configuration&, bool, const Arguments&, cudaStream_t);
}  // namespace fastmoe_cpp::cuda::portable
