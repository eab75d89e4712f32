#include "launch.cuh"

namespace fastmoe_cpp::cuda::portable {
template cudaError_t launch<Kind::linear_grad, __nv_bfloat16>(const Configuration&, bool, const Arguments&,
                                                              cudaStream_t);
}  // namespace fastmoe_cpp::cuda::portable
