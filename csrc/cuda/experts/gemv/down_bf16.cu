#include "gemv.cuh"
#include "launch.h"

namespace fastmoe_cpp::cuda::gemv {
template <>
cudaError_t launch_down<__nv_bfloat16>(const ExpertShape& shape, const Arguments& args, cudaStream_t stream) {
  return launch<__nv_bfloat16, Kind::down>(shape, args, stream);
}
template <>
cudaError_t launch_combined_down<__nv_bfloat16>(const ExpertShape& shape, const Arguments& args, cudaStream_t stream) {
  return launch<__nv_bfloat16, Kind::combined_down>(shape, args, stream);
}
}  // namespace fastmoe_cpp::cuda::gemv
