#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "experts.h"
#include "memory.h"

namespace fastmoe_cpp::cpu {
namespace {

struct Groups {
  Groups(const Tensor& expert_offsets, int64_t rows)
      : offsets(expert_offsets.const_data_ptr<int32_t>()), experts(expert_offsets.size(0) - 1) {
    check_offsets(expert_offsets, rows);
    served = offsets[experts];
    blocks = row_blocks(offsets, experts, kBlockRows);
  }
  const int32_t* offsets;
  int64_t experts, served;
  std::vector<RowBlock> blocks;
};

Tensor with_unit_stride(const Tensor& rows) { return rows.stride(-1) == 1 ? rows : rows.contiguous(); }

template <typename T>
void zero_tail(const Tensor& rows, int64_t served) {
  T* data = rows.mutable_data_ptr<T>();
  std::fill(data + served * rows.size(1), data + rows.numel(), T(0));
}

// out [S, n] = rows [S, k] @ weight[expert] (+ bias), where `slice(expert)` is [k, n].
template <typename T, typename Slice>
void grouped_product(const Groups& groups, const Tensor& rows, int64_t n, const Slice& slice, const T* bias,
                     const Tensor& out) {
  const int64_t k = rows.size(1), stride = rows.stride(0);
  const T* from = rows.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const auto columns = cut_columns(groups.blocks.size(), groups.served, n, k);
  run_tasks(groups.blocks.size() * columns.count, [&](int64_t task, Scratch& scratch) {
    const auto& block = groups.blocks[task / columns.count];
    const int64_t c0 = columns.begin(task % columns.count), c1 = columns.end(task % columns.count);
    multiply_rows<T>(scratch, block.rows(), c1 - c0, k, from + block.begin * stride, stride,
                     slice(block.expert).at(0, c0), bias ? bias + block.expert * n + c0 : nullptr,
                     to + block.begin * n + c0, n);
  });
  zero_tail<T>(out, groups.served);
}

template <typename T>
Matrix<const T> slice_of(const Tensor& weight, int64_t expert) {
  return {weight.const_data_ptr<T>() + expert * weight.stride(0), weight.stride(1), weight.stride(2)};
}

Tensor grouped_linear(const Tensor& rows, const Tensor& weight_, const Tensor& expert_offsets,
                      const OptionalTensor& bias_) {
  check_grouped_linear(rows, weight_, expert_offsets, bias_);
  const Groups groups(expert_offsets, rows.size(0));
  const Tensor x = with_unit_stride(rows), weight = blas_weight(weight_);
  const Tensor bias = has(bias_) ? bias_->contiguous() : Tensor();
  Tensor out = empty({rows.size(0), weight.size(1)}, rows.options());
  with_floating(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    grouped_product<T>(
        groups, x, weight.size(1), [&](int64_t e) { return slice_of<T>(weight, e).t(); },
        pointer_or_null<const T>(bias), out);
  });
  return out;
}

// grad [E, out, in]: rows first .. last of grad_output [S, out], transposed, @ the same rows of x [S, in].
template <typename T>
void weight_gradient(const Groups& groups, const Tensor& grad_output, const Tensor& x, const Tensor& grad) {
  using A = acc_t<T>;
  const int64_t n = x.size(1), m = grad_output.size(1);
  T* to = grad.mutable_data_ptr<T>();
  const auto columns = cut_columns(groups.experts, groups.served, n, m);
  run_tasks(groups.experts * columns.count, [&](int64_t task, Scratch& scratch) {
    const int64_t e = task / columns.count, first = groups.offsets[e], rows = groups.offsets[e + 1] - first;
    const int64_t c0 = columns.begin(task % columns.count), width = columns.end(task % columns.count) - c0;
    T* out = to + e * m * n + c0;
    if (rows == 0) {
      for (int64_t r = 0; r < m; ++r) std::fill_n(out + r * n, width, T(0));
      return;
    }
    const Matrix<const T> g{grad_output.const_data_ptr<T>() + first * grad_output.stride(0), grad_output.stride(0), 1};
    const Matrix<const T> b{x.const_data_ptr<T>() + first * x.stride(0) + c0, x.stride(0), 1};
    Matrix<A> sum;
    if constexpr (std::is_same_v<T, A>)
      sum = rows_of(out, n);
    else
      sum = rows_of(scratch.get<A>(3, m * width), width);
    multiply<T, T>(scratch, m, width, rows, g.t(), b, sum);
    if constexpr (!std::is_same_v<T, A>)
      for (int64_t r = 0; r < m; ++r) kernels<T>().store(width, sum.data + r * width, out + r * n);
  });
}

template <typename T>
void bias_gradient(const Groups& groups, const Tensor& grad_output, const Tensor& grad) {
  using A = acc_t<T>;
  const int64_t n = grad_output.size(1), stride = grad_output.stride(0);
  run_tasks(groups.experts, [&](int64_t e, Scratch& scratch) {
    ColumnSum sum(n, scratch.get<double>(0, n));
    A* row = scratch.get<A>(1, n);
    for (int64_t s = groups.offsets[e]; s < groups.offsets[e + 1]; ++s) {
      kernels<T>().load(n, grad_output.const_data_ptr<T>() + s * stride, A(1), row);
      sum.add(row);
    }
    sum.store(grad.mutable_data_ptr<T>() + e * n);
  });
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(const Tensor& grad_output, const Tensor& rows,
                                                           const Tensor& weight_, const Tensor& expert_offsets,
                                                           std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad_output, rows, weight_, expert_offsets);
  const Groups groups(expert_offsets, rows.size(0));
  const Tensor g = with_unit_stride(grad_output), x = with_unit_stride(rows), weight = blas_weight(weight_);
  const auto options = rows.options();
  const auto wanted = [&](int i, at::IntArrayRef sizes) {
    return output_mask[i] ? empty(sizes, options) : at::empty({0}, options);
  };
  const Tensor grad_rows = wanted(0, rows.sizes()), grad_weight = wanted(1, weight.sizes());
  const Tensor grad_bias = wanted(2, {weight.size(0), weight.size(1)});
  with_floating(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (output_mask[0])
      grouped_product<T>(
          groups, g, x.size(1), [&](int64_t e) { return slice_of<T>(weight, e); }, static_cast<const T*>(nullptr),
          grad_rows);
    if (output_mask[1]) weight_gradient<T>(groups, g, x, grad_weight);
    if (output_mask[2]) bias_gradient<T>(groups, g, grad_bias);
  });
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastmoe_cpp::cpu

TORCH_LIBRARY_IMPL(fastmoe_cpp, CPU, m) {
  using namespace fastmoe_cpp::cpu;
  m.impl("grouped_linear", grouped_linear);
  m.impl("grouped_linear_backward", grouped_linear_backward);
}
