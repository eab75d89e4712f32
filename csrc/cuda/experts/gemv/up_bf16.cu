#include "gemv.cuh"
#include "launch.h"

namespace fastmoe_cpp::cuda::gemv {
template <>
cudaError_t launch_up<__nv_bfloat16>(const ExpertShape& shape, const Arguments& args, cudaStream_t stream) {
  return is_gated(shape.activation) ? launch<__nv_bfloat16, Kind::gated_up>(shape, args, stream)
                                    : launch<__nv_bfloat16, Kind::plain_up>(shape, args, stream);
}
}  // namespace fastmoe_cpp::cuda::gemv
