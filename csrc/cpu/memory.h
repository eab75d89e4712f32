#pragma once
#include <ATen/core/Tensor.h>

namespace fastmoe_cpp::cpu {

// at::empty, with large pages asked for where the tensor is large. Such tensors are fresh memory in every call, and the
// kernel takes as long to hand it out in pages of 4 KiB as a GEMM takes to fill it.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace fastmoe_cpp::cpu
