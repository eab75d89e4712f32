#include "gemm.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

namespace fastmoe_cpp::cpu {

// Straight to the CPU kernels: no dispatch, no autograd, the same in every thread.
template <typename A>
void blas(int64_t m, int64_t n, int64_t k, Matrix<const A> a, Matrix<const A> b, Matrix<A> c, bool accumulate) {
  const auto view = [](const A* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    return at::from_blob(const_cast<A*>(data), {rows, columns}, {row_stride, column_stride},
                         c10::CppTypeToScalarType<A>::value);
  };
  const auto x = view(a.data, m, k, a.row_stride, a.column_stride),
             y = view(b.data, k, n, b.row_stride, b.column_stride);
  auto out = view(c.data, m, n, c.row_stride, c.column_stride);
  if (accumulate)
    at::cpu::addmm_out(out, out, x, y, 1, 1);
  else
    at::cpu::mm_out(out, x, y);
}
template void blas<float>(int64_t, int64_t, int64_t, Matrix<const float>, Matrix<const float>, Matrix<float>, bool);
template void blas<double>(int64_t, int64_t, int64_t, Matrix<const double>, Matrix<const double>, Matrix<double>, bool);

at::Tensor blas_weight(const at::Tensor& weight) {
  const int64_t rows = weight.size(1), columns = weight.size(2);
  const auto by_rows = weight.stride(2) == 1 && weight.stride(1) >= columns;
  const auto by_columns = weight.stride(1) == 1 && weight.stride(2) >= rows;
  return by_rows || by_columns ? weight : weight.contiguous();
}

}  // namespace fastmoe_cpp::cpu
