// Sinkhorn normalisation in one cooperative launch: every iteration is one pass over the costs and two grid barriers.
#include <cooperative_groups.h>

#include <algorithm>

#include "router.cuh"

namespace fastmoe_cpp::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// Lane l owns the experts l, l + 32, ...: rows are read in whole lines, whatever E.
template <int N, typename A>
__device__ __forceinline__ void load_row(const A* row, int experts, A (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = i * kWarp + lane_id() < experts ? row[i * kWarp + lane_id()] : A(0);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 1) sinkhorn_kernel(const SinkhornParams p) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* block_sum = reinterpret_cast<A*>(shared);
  const auto grid = cooperative_groups::this_grid();
  const int lane = lane_id(), warp = threadIdx.x / kWarp, experts = p.experts;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + warp,
                step = static_cast<int64_t>(gridDim.x) * kWarps;
  const A epsilon = A(1e-8);
  const T* logits = static_cast<const T*>(p.logits);
  A *out = static_cast<A*>(p.out), *row_scale = static_cast<A*>(p.row_scale), *partial = static_cast<A*>(p.partial);
  A* column_scale = static_cast<A*>(p.column_scale);

  for (int64_t t = first; t < p.tokens; t += step)
    for (int e = lane; e < experts; e += kWarp) out[t * experts + e] = exp_of(to_acc(logits[t * experts + e]));
  A column[N];
#pragma unroll
  for (int i = 0; i < N; ++i) column[i] = i * kWarp + lane < experts ? A(1) : A(0);

  for (int iteration = 1;; ++iteration) {
    A sum[N] = {};
    for (int64_t t = first; t < p.tokens; t += step) {
      A cost[N], dot = 0;
      load_row(out + t * experts, experts, cost);
#pragma unroll
      for (int i = 0; i < N; ++i) dot += column[i] * cost[i];
      const A scale = A(1) / (A(p.tokens) * (warp_sum(dot) + epsilon));
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += scale * cost[i];
      if (lane == 0) row_scale[t] = scale;
    }
    for (int w = 0; w < kWarps; ++w) {  // warps add in order
      if (warp == w)
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (const int e = i * kWarp + lane; e < experts) block_sum[e] = w ? block_sum[e] + sum[i] : sum[i];
      __syncthreads();
    }
    for (int e = threadIdx.x; e < experts; e += kThreads) partial[blockIdx.x * experts + e] = block_sum[e];
    grid.sync();
    A* next = column_scale + (iteration % 2) * experts;
    for (int64_t e = first; e < experts; e += step) {
      A total = 0;
      for (int b = lane; b < gridDim.x; b += kWarp) total += partial[b * experts + e];
      total = warp_sum(total);
      if (lane == 0) next[e] = A(1) / (A(experts) * (total + epsilon));
    }
    grid.sync();
    A change = 0, before[N];
#pragma unroll
    for (int i = 0; i < N; ++i) before[i] = column[i];
    load_row(next, experts, column);
#pragma unroll
    for (int i = 0; i < N; ++i) change += fabs(before[i] - column[i]);
    change = warp_sum(change) / A(experts);
    // every warp of the grid computes the same bits here, so all leave together; a NaN leaves too
    if (iteration == (p.iterations ? p.iterations : kSinkhornLimit)) break;
    if (p.iterations == 0 && !(change > A(p.tolerance))) break;
  }
  for (int64_t t = first; t < p.tokens; t += step) {
    const A scale = row_scale[t];
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (const int64_t e = i * kWarp + lane; e < experts)
        out[t * experts + e] = column[i] * out[t * experts + e] * scale;
  }
}

template <typename T, int N = 2, typename F>
cudaError_t with_kernel(int experts, F&& f) {
  if constexpr (N < 32)
    if (experts > N * kWarp) return with_kernel<T, 4 * N>(experts, f);
  return f(sinkhorn_kernel<T, N>, experts * sizeof(Acc<T>));
}

}  // namespace

cudaError_t sinkhorn_blocks(const SinkhornParams& p, int64_t* blocks) {
  return with_dtype(p.dtype, [&](auto zero) {
    return with_kernel<decltype(zero)>(p.experts, [&](auto kernel, size_t bytes) {
      int device, processors, resident;
      if (const auto e = cudaGetDevice(&device)) return e;
      if (const auto e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
      if (const auto e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes)) return e;
      *blocks = std::clamp<int64_t>(ceil_div(p.tokens, kWarps), 1, static_cast<int64_t>(processors) * resident);
      return cudaSuccess;
    });
  });
}

cudaError_t sinkhorn(const SinkhornParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  int64_t blocks = 0;
  if (const auto e = sinkhorn_blocks(p, &blocks)) return e;
  return with_dtype(p.dtype, [&](auto zero) {
    return with_kernel<decltype(zero)>(p.experts, [&](auto kernel, size_t bytes) {
      cudaLaunchAttribute cooperative{};
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(blocks));
      config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = bytes;
      config.stream = stream;
      config.attrs = &cooperative;
      config.numAttrs = 1;
      return cudaLaunchKernelEx(&config, kernel, p);
    });
  });
}

}  // namespace fastmoe_cpp::cuda
