#include "gemv.cuh"
#include "launch.h"

namespace fastmoe_cpp::cuda::gemv {
template <>
cudaError_t launch_up<__half>(const ExpertShape& shape, const Arguments& args, cudaStream_t stream) {
  return is_gated(shape.activation) ? launch<__half, Kind::gated_up>(shape, args, stream)
                                    : launch<__half, Kind::plain_up>(shape, args, stream);
}
}  // namespace fastmoe_cpp::cuda::gemv
