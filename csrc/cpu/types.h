// From a tensor's dtype to a C++ type.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "vector/kernels.h"

#define FASTMOE_FOR_FLOATING(f) f(double) f(float) f(c10::BFloat16) f(c10::Half)

namespace fastmoe_cpp::cpu {

// Calls f with a zero of the C++ type.
template <typename F>
void with_floating(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kDouble: return f(double(0));
    case at::kFloat: return f(float(0));
    case at::kBFloat16: return f(c10::BFloat16());
    case at::kHalf: return f(c10::Half());
    default: TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16, got ", type);
  }
}

// As with_floating, for tensors in which sums are kept.
template <typename F>
void with_accumulator(at::ScalarType type, const F& f) {
  if (type == at::kDouble)
    f(double(0));
  else
    f(float(0));
}

template <typename T>
T* pointer_or_null(const at::Tensor& t) {
  if (!t.defined()) return nullptr;
  if constexpr (std::is_const_v<T>)
    return t.const_data_ptr<std::remove_const_t<T>>();
  else
    return t.mutable_data_ptr<T>();
}

}  // namespace fastmoe_cpp::cpu
