#include "rows.h"

#include <algorithm>

#include "../../device.cuh"

namespace fastmoe_cpp::cuda::portable {
namespace {

constexpr int kColumns = 32, kRows = 32;  // of a CTA of column_sums

template <class T>
__global__ void __launch_bounds__(kColumns* kRows) sum_columns(const __grid_constant__ ColumnSums p, Divider top_k) {
  using A = Acc<T>;
  __shared__ A sums[kRows][kColumns];
  const int blocks = (p.columns + kColumns - 1) / kColumns;
  const int expert = blockIdx.x / blocks, column = blockIdx.x % blocks * kColumns + threadIdx.x;
  const int first = p.expert_offsets[expert], last = p.expert_offsets[expert + 1];
  const T* left = static_cast<const T*>(p.left);
  A sum = 0;
  if (column < p.columns) {
#pragma unroll 4
    for (int s = first + static_cast<int>(threadIdx.y); s < last; s += kRows) {
      const int pair = p.slot_index ? p.slot_index[s] : s;
      const int64_t row = p.gather ? top_k(pair) : s;
      const A weight = p.weights ? static_cast<const A*>(p.weights)[pair] : A(1);
      sum += weight * to_acc(left[row * p.columns + column]);
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= p.columns) return;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) sum += sums[i][threadIdx.x];
  static_cast<T*>(p.grad)[static_cast<int64_t>(expert) * p.columns + weight_row(column, p.alternate)] =
      from_acc<T>(sum);
}

constexpr int kDotThreads = 256;

// A slot a thread, or a warp where rows are to be multiplied by a bias.
template <class T, bool kBias>
__global__ void __launch_bounds__(kDotThreads) dot_slots(const __grid_constant__ SlotDots p, Divider top_k) {
  using A = Acc<T>;
  const int64_t s = (int64_t{blockIdx.x} * kDotThreads + threadIdx.x) / (kBias ? kWarp : 1);
  if (s >= p.expert_offsets[p.experts]) return;
  A bias_dot = 0;
  if constexpr (kBias) {
    int low = 0, high = p.experts;  // the expert e with offsets[e] <= s < offsets[e + 1]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (p.expert_offsets[middle] <= s ? low : high) = middle;
    }
    const T* g = static_cast<const T*>(p.grad_output) + int64_t{top_k(p.slot_index[s])} * p.hidden;
    const T* bias = static_cast<const T*>(p.bias) + int64_t{low} * p.hidden;
#pragma unroll 4
    for (int c = lane_id(); c < p.hidden; c += kWarp) bias_dot += to_acc(g[c]) * to_acc(bias[c]);
    bias_dot = warp_sum(bias_dot);
    if (lane_id()) return;
  }
  A dot = 0;
  for (int b = 0; b < p.blocks; ++b) dot += static_cast<const A*>(p.partial)[b * p.slots + s];
  static_cast<A*>(p.grad_weight)[s] = dot + bias_dot;
}

template <class T>
__global__ void fill_tail(T* rows, const int32_t* expert_offsets, int experts, int64_t slots, int64_t columns) {
  const int64_t first = expert_offsets[experts] * columns, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = first + int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < slots * columns; i += step)
    rows[i] = T(0.f);
}

}  // namespace

cudaError_t column_sums(const ColumnSums& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    return cuda::launch(sum_columns<decltype(zero)>, p.experts * ceil_div(p.columns, kColumns), dim3(kColumns, kRows),
                        0, stream, p, Divider(p.top_k));
  });
}

cudaError_t slot_dots(const SlotDots& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return cuda::launch(p.bias ? dot_slots<T, true> : dot_slots<T, false>,
                        ceil_div(p.slots * (p.bias ? kWarp : 1), kDotThreads), dim3(kDotThreads), 0, stream, p,
                        Divider(p.top_k));
  });
}

cudaError_t zero_tail(DType dtype, void* rows, const int32_t* expert_offsets, int experts, int64_t slots,
                      int64_t columns, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = std::min<int64_t>(ceil_div(slots * columns, 256), 512);
    return cuda::launch(fill_tail<T>, blocks, dim3(256), 0, stream, static_cast<T*>(rows), expert_offsets, experts,
                        slots, columns);
  });
}

}  // namespace fastmoe_cpp::cuda::portable
