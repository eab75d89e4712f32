#include "gemv.cuh"
#include "launch.h"

namespace fastmoe_cpp::cuda::gemv {
template <>
cudaError_t launch_down<__half>(const ExpertShape& shape, const Arguments& args, cudaStream_t stream) {
  return launch<__half, Kind::down>(shape, args, stream);
}
template <>
cudaError_t launch_combined_down<__half>(const ExpertShape& shape, const Arguments& args, cudaStream_t stream) {
  return launch<__half, Kind::combined_down>(shape, args, stream);
}
}  // namespace fastmoe_cpp::cuda::gemv
