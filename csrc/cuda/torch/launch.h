// What every torch half shares: torch's types in the launches' terms.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../../ops/checks.h"
#include "../experts/experts.h"

namespace fastmoe_cpp::cuda {

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_TYPE(false, "expected a float64, float32, bfloat16 or float16 tensor, got ", t.scalar_type());
  }
}

// `t` as contiguous memory of `type`; undefined stays undefined.
inline Tensor contiguous_as(const Tensor& t, at::ScalarType type) { return t.defined() ? t.to(type).contiguous() : t; }
inline Tensor contiguous_as(const OptionalTensor& t, at::ScalarType type) {
  return has(t) ? contiguous_as(*t, type) : Tensor();
}

// at::empty without the dispatcher, whose steps take longer than a kernel of a decoding pass does to start.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  return Tensor(at::detail::empty_cuda(sizes, type, device, std::nullopt));
}

// What kernels ask of memory that they read or write by 16 bytes; undefined is nowhere.
inline bool on_16_bytes(const Tensor& t) {
  return !t.defined() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

inline const void* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

}  // namespace fastmoe_cpp::cuda
