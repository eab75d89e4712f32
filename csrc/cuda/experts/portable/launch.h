// The kernels behind the launches: every kind of product for every element type, each instantiated in its own file.
#pragma once
#include <cuda_runtime.h>

#include "arguments.h"
#include "config.h"

namespace fastmoe_cpp::cuda::portable {

template <Kind kKind, class T>
cudaError_t launch(const Configuration&, bool vectorised, const Arguments&, cudaStream_t);

}  // namespace fastmoe_cpp::cuda::portable
