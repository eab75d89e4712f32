// The kernels behind the launches, each dtype and product instantiated in its own file.
#pragma once
#include <cuda_runtime.h>

#include "arguments.h"

namespace fastmoe_cpp::cuda::gemv {

template <class T>
cudaError_t launch_up(const ExpertShape&, const Arguments&, cudaStream_t);
template <class T>
cudaError_t launch_down(const ExpertShape&, const Arguments&, cudaStream_t);
template <class T>
cudaError_t launch_combined_down(const ExpertShape&, const Arguments&, cudaStream_t);

}  // namespace fastmoe_cpp::cuda::gemv
