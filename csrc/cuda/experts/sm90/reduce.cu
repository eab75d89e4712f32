#include "reduce.cuh"

#include <algorithm>

#include "epilogue.cuh"
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {
namespace {

template <typename T>
__device__ __forceinline__ void add_scaled(float (&sum)[8], const T* source, float scale) {
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(w[i]);
    sum[2 * i] += pair.x * scale;
    sum[2 * i + 1] += pair.y * scale;
  }
}

__device__ __forceinline__ int expert_of(const int32_t* expert_offsets, int experts, int slot) {
  int low = 0, high = experts;  // the last expert that begins at or before the slot
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (expert_offsets[middle] <= slot ? low : high) = middle;
  }
  return low;
}

// A thread a slot.
__global__ void sum_partials(const float* partial, int n_tiles, int64_t slots, const int32_t* expert_offsets,
                             int experts, float* grad_weight) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= slots) return;
  float sum = 0;
  if (slot < expert_offsets[experts]) {
    for (int n = 0; n < n_tiles; ++n) sum += partial[n * slots + slot];
  }
  grad_weight[slot] = sum;
}

// A warp a slot.
template <typename T>
__global__ void add_bias_dot(const T* grad_output, const T* bias, const int32_t* slot_index,
                             const int32_t* expert_offsets, int experts, int top_k, int64_t hidden, int64_t slots,
                             float* grad_weight) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (slot >= slots || slot >= expert_offsets[experts]) return;
  const int expert = expert_of(expert_offsets, experts, static_cast<int>(slot)), lane = threadIdx.x & 31;
  const T* const row = grad_output + static_cast<int64_t>(slot_index[slot] / top_k) * hidden;
  const T* const bias_row = bias + expert * hidden;
  float sum = 0;
  for (int64_t c = lane; c < hidden; c += 32) sum += static_cast<float>(row[c]) * static_cast<float>(bias_row[c]);
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, delta);
  if (lane == 0) grad_weight[slot] += sum;
}

// Blocks: of each expert, 256 columns each; 32 threads across (8 columns each) by 8 down.
template <typename T>
__global__ void __launch_bounds__(256)
    sum_rows(const T* left, const int32_t* slot_index, const int32_t* expert_offsets, const float* scale, bool gathered,
             int top_k, int64_t columns, bool interleaved, T* grad_bias) {
  __shared__ float sums[8][256];
  const int column_blocks = static_cast<int>((columns + 255) / 256);
  const int lane = threadIdx.x & 31, part = threadIdx.x >> 5, expert = blockIdx.x / column_blocks;
  const int64_t first_column = blockIdx.x % column_blocks * 256, column = first_column + lane * 8;
  float sum[8] = {};
  if (column < columns) {
    for (int slot = expert_offsets[expert] + part; slot < expert_offsets[expert + 1]; slot += 8) {
      const int pair = slot_index[slot];
      const int64_t row = gathered ? pair / top_k : slot;
      add_scaled<T>(sum, left + row * columns + column, scale == nullptr ? 1.0f : scale[pair]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[part][lane * 8 + i] = sum[i];
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) total += sums[i][threadIdx.x];
  const int64_t c = first_column + threadIdx.x, half = columns / 2;
  const int64_t out = !interleaved ? c : c < half ? 2 * c : 2 * (c - half) + 1;
  if (c < columns) grad_bias[expert * columns + out] = static_cast<T>(total);
}

}  // namespace

template <typename T>
cudaError_t launch_weight_dot(const ActGradParams& p, const float* partial, int n_tiles, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  const Plan& plan = p.plan;
  FASTMOE_RETURN_IF_ERROR(cuda::launch(sum_partials, ceil_div(shape.slots(), 256), dim3(256), 0, stream, partial,
                                       n_tiles, shape.slots(), plan.expert_offsets, shape.experts, p.grad_weight));
  if (p.down_bias == nullptr) return cudaSuccess;
  return cuda::launch(add_bias_dot<T>, ceil_div(shape.slots(), 8), dim3(256), 0, stream,
                      static_cast<const T*>(p.grad_output), static_cast<const T*>(p.down_bias), plan.slot_index,
                      plan.expert_offsets, shape.experts, shape.top_k, shape.hidden, shape.slots(), p.grad_weight);
}

template <typename T>
cudaError_t launch_bias_grad(const ExpertShape& shape, const Plan& plan, const void* left, int64_t columns,
                             bool gathered, const float* scale, bool interleaved, void* grad_bias,
                             cudaStream_t stream) {
  return cuda::launch(sum_rows<T>, ceil_div(columns, 256) * shape.experts, dim3(256), 0, stream,
                      static_cast<const T*>(left), plan.slot_index, plan.expert_offsets, scale, gathered, shape.top_k,
                      columns, interleaved, static_cast<T*>(grad_bias));
}

#define FASTMOE_INSTANTIATE(T)                                                                                        \
  template cudaError_t launch_weight_dot<T>(const ActGradParams&, const float*, int, cudaStream_t);                   \
  template cudaError_t launch_bias_grad<T>(const ExpertShape&, const Plan&, const void*, int64_t, bool, const float*, \
                                           bool, void*, cudaStream_t);
FASTMOE_INSTANTIATE(__nv_bfloat16)
FASTMOE_INSTANTIATE(__half)

}  // namespace fastmoe_cpp::cuda::sm90
