#include "losses.h"

#include <algorithm>

#include "device.cuh"

namespace fastmoe_cpp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxLossBlocks = 1024;
constexpr int64_t kPairsPerBlock = 2048;

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

template <typename A>
__device__ __forceinline__ A count_at(const void* counts, CountType type, int64_t i) {
  if (type == CountType::i64) return static_cast<A>(static_cast<const int64_t*>(counts)[i]);
  if (type == CountType::f32) return static_cast<const float*>(counts)[i];
  return static_cast<A>(static_cast<const double*>(counts)[i]);
}

// The sum of x over the block, in every thread, in a fixed order.
template <typename X>
__device__ X block_sum(X x) {
  __shared__ X sums[kWarp];
  x = warp_sum(x);
  __syncthreads();
  if (lane_id() == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  X total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x / kWarp); ++w) total += sums[w];
  return total;
}

__device__ double sum_of(const double* parts, int n) {
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += parts[i];
  return block_sum(sum);
}

// f(row) for the rows of this warp; whole warps call f together.
template <typename F>
__device__ void each_row(int64_t rows, const bool* padding_mask, F&& f) {
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; r < rows;
       r += static_cast<int64_t>(gridDim.x) * kWarps)
    f(r, padding_mask && padding_mask[r]);
}

template <typename Id>
__global__ void __launch_bounds__(kThreads)
    expert_counts_kernel(const ExpertCountsParams p, const int blocks_a_sequence) {
  extern __shared__ int counts[];
  const int64_t sequence = blockIdx.x / blocks_a_sequence, pairs = p.length * p.top_k;
  const int64_t part = blockIdx.x % blocks_a_sequence;
  for (int e = threadIdx.x; e < p.experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  const Id* ids = static_cast<const Id*>(p.topk_ids) + sequence * pairs;
  for (int64_t i = part * kThreads + threadIdx.x; i < pairs; i += static_cast<int64_t>(blocks_a_sequence) * kThreads) {
    const int64_t id = ids[i];
    require_expert_id(sequence * pairs + i, id, p.experts);
    if (id >= 0 && !(p.padding_mask && p.padding_mask[sequence * p.length + i / p.top_k])) atomicAdd(counts + id, 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kThreads)  // integers: any order gives the same sum
    if (counts[e])
      atomicAdd(reinterpret_cast<unsigned long long*>(p.counts + sequence * p.experts + e),
                static_cast<unsigned long long>(counts[e]));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) balance_loss_kernel(const BalanceLossParams p) {
  using A = Acc<T>;
  double sum = 0;
  each_row(p.sequences * p.length, p.padding_mask, [&](int64_t r, bool padding) {
    if (padding) return;
    const T* row = static_cast<const T*>(p.scores) + r * p.experts;
    const int64_t counts = r / p.length * p.experts;
    A mine = 0;
#pragma unroll 4
    for (int64_t e = lane_id(); e < p.experts; e += kWarp)
      mine += to_acc(row[e]) * count_at<A>(p.counts, p.count_type, counts + e);
    sum += mine;
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = sum;
}

// loss = scale * sum(sums) / sum(counts), or without counts scale * sum(sums)
template <typename A>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* sums, const double* counts, int n, double scale, A* loss) {
  const double sum = sum_of(sums, n);
  const double count = counts ? sum_of(counts, n) : 1;
  if (threadIdx.x == 0) *loss = static_cast<A>(count > 0 ? scale * sum / count : 0);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) balance_loss_backward_kernel(const BalanceLossBackwardParams p) {
  using A = Acc<T>;
  const double factor = p.scale * static_cast<double>(*static_cast<const A*>(p.grad_loss));
  each_row(p.sequences * p.length, p.padding_mask, [&](int64_t r, bool padding) {
    T* row = static_cast<T*>(p.grad_scores) + r * p.experts;
    const int64_t counts = r / p.length * p.experts;
    for (int64_t e = lane_id(); e < p.experts; e += kWarp)
      row[e] =
          from_acc<T>(padding ? A(0) : static_cast<A>(factor * count_at<double>(p.counts, p.count_type, counts + e)));
  });
}

// log(sum(exp(row))) = shift + log(sum), by a warp.
template <typename A>
struct LogSumExp {
  A shift = -A(INFINITY), sum = 0;
  template <typename T>
  __device__ LogSumExp(const T* row, int64_t experts) {
#pragma unroll 4
    for (int64_t e = lane_id(); e < experts; e += kWarp) shift = fmax(shift, to_acc(row[e]));
    shift = warp_max_number(shift);
    if (isinf(shift)) shift = 0;
#pragma unroll 4
    for (int64_t e = lane_id(); e < experts; e += kWarp) sum += exp_of(to_acc(row[e]) - shift);
    sum = warp_sum(sum);
  }
  __device__ A value() const { return shift + log_of(sum); }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) z_loss_kernel(const ZLossParams p) {
  double sum = 0, count = 0;
  each_row(p.tokens, p.padding_mask, [&](int64_t t, bool padding) {
    if (padding) return;
    const double lse = LogSumExp<Acc<T>>(static_cast<const T*>(p.logits) + t * p.experts, p.experts).value();
    if (lane_id() == 0) sum += lse * lse, count += 1;
  });
  sum = block_sum(sum);
  count = block_sum(count);
  if (threadIdx.x == 0) {
    p.partial[blockIdx.x] = sum;
    p.partial[gridDim.x + blockIdx.x] = count;
  }
}

__global__ void __launch_bounds__(kThreads) count_unpadded_kernel(const bool* mask, int64_t n, double* partial) {
  int64_t count = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * kThreads)
    count += !mask[i];
  const double sum = block_sum(static_cast<double>(count));
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) z_loss_backward_kernel(const ZLossBackwardParams p, const int parts) {
  using A = Acc<T>;
  const double count = p.padding_mask ? sum_of(p.partial, parts) : static_cast<double>(p.tokens);
  const double factor = 2 * p.scale * static_cast<double>(*static_cast<const A*>(p.grad_loss)) / count;
  each_row(p.tokens, p.padding_mask, [&](int64_t t, bool padding) {
    const T* row = static_cast<const T*>(p.logits) + t * p.experts;
    T* grad = static_cast<T*>(p.grad_logits) + t * p.experts;
    if (padding) {
      for (int64_t e = lane_id(); e < p.experts; e += kWarp) grad[e] = from_acc<T>(A(0));
      return;
    }
    const LogSumExp<A> lse(row, p.experts);
    const A slope = static_cast<A>(factor * lse.value()) / lse.sum;
    for (int64_t e = lane_id(); e < p.experts; e += kWarp)
      grad[e] = from_acc<T>(slope * exp_of(to_acc(row[e]) - lse.shift));
  });
}

template <typename A>
__global__ void __launch_bounds__(kThreads) update_expert_bias_kernel(const UpdateExpertBiasParams p) {
  double sum = 0;
  for (int64_t e = threadIdx.x; e < p.experts; e += kThreads) sum += count_at<double>(p.counts, p.count_type, e);
  const double mean = block_sum(sum) / p.experts;
  const auto sign = [&](int64_t e) {
    const double count = count_at<double>(p.counts, p.count_type, e);
    return (mean > count) - (mean < count);
  };
  int signs = 0;
  for (int64_t e = threadIdx.x; e < p.experts; e += kThreads) signs += sign(e);
  const double mean_step = p.zero_mean ? p.rate * block_sum(signs) / p.experts : 0;
  for (int64_t e = threadIdx.x; e < p.experts; e += kThreads)
    static_cast<A*>(p.bias)[e] += static_cast<A>(p.rate * sign(e) - mean_step);
}

template <typename Params>
cudaError_t finish(const Params& p, const double* counts, int64_t blocks, cudaStream_t stream) {
  return p.dtype == DType::f64
             ? launch(finish_kernel<double>, 1, kThreads, 0, stream, p.partial, counts, blocks, p.scale, p.loss)
             : launch(finish_kernel<float>, 1, kThreads, 0, stream, p.partial, counts, blocks, p.scale, p.loss);
}

// Rows without a sum over them: a warp a row, as many blocks as that takes.
int64_t row_blocks(int64_t rows) { return ceil_div(rows, kWarps); }

}  // namespace

// By the number of rows alone, so that the order of the sums is the same on every device.
int64_t loss_blocks(int64_t rows) { return std::clamp<int64_t>(ceil_div(rows, 4 * kWarps), 1, kMaxLossBlocks); }

cudaError_t expert_counts(const ExpertCountsParams& p, cudaStream_t stream) {
  const int64_t pairs = p.length * p.top_k;
  if (p.sequences * pairs == 0) return cudaSuccess;
  const int64_t blocks = std::clamp<int64_t>(ceil_div(pairs, kPairsPerBlock), 1, kMaxLossBlocks);
  const auto run = [&](auto kernel) {
    return launch(kernel, p.sequences * blocks, kThreads, p.experts * sizeof(int), stream, p, blocks);
  };
  return p.wide_ids ? run(expert_counts_kernel<int64_t>) : run(expert_counts_kernel<int32_t>);
}

cudaError_t balance_loss(const BalanceLossParams& p, cudaStream_t stream) {
  const int64_t blocks = loss_blocks(p.sequences * p.length);
  const auto e = with_dtype(
      p.dtype, [&](auto zero) { return launch(balance_loss_kernel<decltype(zero)>, blocks, kThreads, 0, stream, p); });
  return e ? e : finish(p, nullptr, blocks, stream);
}

cudaError_t balance_loss_backward(const BalanceLossBackwardParams& p, cudaStream_t stream) {
  const int64_t rows = p.sequences * p.length;
  if (rows * p.experts == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto zero) {
    return launch(balance_loss_backward_kernel<decltype(zero)>, row_blocks(rows), kThreads, 0, stream, p);
  });
}

cudaError_t z_loss(const ZLossParams& p, cudaStream_t stream) {
  const int64_t blocks = loss_blocks(p.tokens);
  const auto e = with_dtype(
      p.dtype, [&](auto zero) { return launch(z_loss_kernel<decltype(zero)>, blocks, kThreads, 0, stream, p); });
  return e ? e : finish(p, p.partial + blocks, blocks, stream);
}

cudaError_t z_loss_backward(const ZLossBackwardParams& p, cudaStream_t stream) {
  if (p.tokens * p.experts == 0) return cudaSuccess;
  const int64_t parts = loss_blocks(p.tokens);
  if (p.padding_mask)
    if (const auto e = launch(count_unpadded_kernel, parts, kThreads, 0, stream, p.padding_mask, p.tokens, p.partial))
      return e;
  return with_dtype(p.dtype, [&](auto zero) {
    return launch(z_loss_backward_kernel<decltype(zero)>, row_blocks(p.tokens), kThreads, 0, stream, p, parts);
  });
}

cudaError_t update_expert_bias(const UpdateExpertBiasParams& p, cudaStream_t stream) {
  if (p.experts == 0) return cudaSuccess;
  return p.wide_bias ? launch(update_expert_bias_kernel<double>, 1, kThreads, 0, stream, p)
                     : launch(update_expert_bias_kernel<float>, 1, kThreads, 0, stream, p);
}

}  // namespace fastmoe_cpp::cuda
