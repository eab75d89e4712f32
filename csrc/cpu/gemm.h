// Matrix products of blocks on one thread, by the BLAS in torch; the 16-bit types are multiplied in float32.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "parallel.h"
#include "vector/kernels.h"

namespace fastmoe_cpp::cpu {

// A matrix in memory. One of its strides is 1.
template <typename T>
struct Matrix {
  T* data;
  int64_t row_stride, column_stride;
  Matrix at(int64_t row, int64_t column) const {
    return {data + row * row_stride + column * column_stride, row_stride, column_stride};
  }
  Matrix t() const { return {data, column_stride, row_stride}; }
  operator Matrix<const T>() const { return {data, row_stride, column_stride}; }
};

template <typename T>
Matrix<T> rows_of(T* data, int64_t stride) {
  return {data, stride, 1};
}

// c [m, n] = a [m, k] @ b [k, n], or c += it. A = float or double.
template <typename A>
void blas(int64_t m, int64_t n, int64_t k, Matrix<const A> a, Matrix<const A> b, Matrix<A> c, bool accumulate);

namespace detail {
// Buffers of Scratch that multiply() takes; callers use the slots below.
inline constexpr size_t kLeft = 7, kRight = 6;
inline constexpr int64_t kDepth = 1024, kColumns = 256;

// The matrix in the type products are computed in, copied to `to` in its own order.
template <typename T, typename A = acc_t<T>>
Matrix<const A> converted(int64_t rows, int64_t columns, Matrix<const T> x, A* to) {
  const bool by_rows = x.column_stride == 1;
  const int64_t lines = by_rows ? rows : columns, length = by_rows ? columns : rows;
  const int64_t stride = by_rows ? x.row_stride : x.column_stride;
  for (int64_t i = 0; i < lines; ++i) kernels<T>().load(length, x.data + i * stride, A(1), to + i * length);
  return by_rows ? Matrix<const A>{to, length, 1} : Matrix<const A>{to, 1, length};
}
}  // namespace detail

// As blas(), for matrices of the stored type T: b, and a if TA is T.
template <typename T, typename TA, typename A = acc_t<T>>
void multiply(Scratch& scratch, int64_t m, int64_t n, int64_t k, Matrix<const TA> a, Matrix<const T> b, Matrix<A> c,
              bool accumulate = false) {
  if constexpr (std::is_same_v<TA, A>) {
    if (m <= kFewRows && b.row_stride == 1 && a.column_stride == 1 && c.column_stride == 1 && !accumulate) {
      kernels<T>().few_rows(m, n, k, a.data, a.row_stride, b.data, b.column_stride, c.data, c.row_stride);
      return;
    }
  }
  if constexpr (std::is_same_v<T, A>) {
    blas<A>(m, n, k, a, b, c, accumulate);
  } else {
    using namespace detail;
    if (k == 0) blas<A>(m, n, 0, {nullptr, 1, 1}, {nullptr, 1, 1}, c, accumulate);
    for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
      const int64_t depth = std::min(kDepth, k - k0);
      Matrix<const A> left{};
      if constexpr (std::is_same_v<TA, A>)
        left = a.at(0, k0);
      else
        left = converted<T>(m, depth, a.at(0, k0), scratch.get<A>(kLeft, m * std::min(kDepth, k)));
      for (int64_t n0 = 0; n0 < n; n0 += kColumns) {
        const int64_t columns = std::min(kColumns, n - n0);
        const auto right = converted<T>(depth, columns, b.at(k0, n0), scratch.get<A>(kRight, kDepth * kColumns));
        blas<A>(m, columns, depth, left, right, c.at(0, n0), accumulate || k0 > 0);
      }
    }
  }
}

// A weight [E, out, in] whose slices BLAS can read: contiguous, or with its last two dimensions swapped.
at::Tensor blas_weight(const at::Tensor& weight);

}  // namespace fastmoe_cpp::cpu
