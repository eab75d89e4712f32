#include "combine.h"

#include <algorithm>

#include "device.cuh"
#include "hopper_launch.cuh"

namespace fastmoe_cpp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kZeroBlocks = 264;  // blocks that clear the rows nobody owns

// A block is (x, y): x threads share a row, y rows a block. x is a power of two below a warp, whole warps above.
dim3 row_block(int64_t vectors) {
  int64_t x = 1;
  if (vectors <= kWarp) {
    while (x < vectors) x *= 2;
  } else {
    const int64_t rounds = ceil_div(vectors, kThreads);
    x = ceil_div(ceil_div(vectors, rounds), kWarp) * kWarp;
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(kThreads / x));
}

// The slots (and weights) of up to U experts of a token from k0 on; absent ones are -1.
template <typename A, int U>
struct Picks {
  int32_t slot[U];
  A weight[U];
  __device__ Picks(const int32_t* token_slot, const A* weights, int64_t t, int k0, int top_k, bool active) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool there = active && k0 + u < top_k;
      const int64_t pair = t * top_k + k0 + u;
      slot[u] = there ? __ldg(token_slot + pair) : -1;
      weight[u] = !weights ? A(1) : slot[u] >= 0 ? __ldg(weights + pair) : A(0);
    }
  }
};

template <typename T, int V, int U>
__global__ void __launch_bounds__(kThreads, 3) combine_kernel(const CombineParams p) {
  using A = Acc<T>;
  wait_for_previous_kernel();
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= p.tokens) return;
  const T* rows = static_cast<const T*>(p.rows);
  const A* weights = static_cast<const A*>(p.weights);
  T* out = static_cast<T*>(p.out) + t * p.hidden;
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; c < p.hidden; c += blockDim.x * V) {
    A sum[V] = {};
    for (int k0 = 0; k0 < p.top_k; k0 += U) {
      const Picks<A, U> picks(p.token_slot, weights, t, k0, p.top_k, true);
      Vec<T, V> row[U];
#pragma unroll
      for (int u = 0; u < U; ++u)
        row[u] = picks.slot[u] >= 0 ? load_once<T, V>(rows + picks.slot[u] * p.hidden + c) : Vec<T, V>{};
#pragma unroll
      for (int u = 0; u < U; ++u)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += picks.weight[u] * to_acc(row[u].v[v]);
    }
    Vec<T, V> packed;
#pragma unroll
    for (int v = 0; v < V; ++v) packed.v[v] = from_acc<T>(sum[v]);
    *reinterpret_cast<Vec<T, V>*>(out + c) = packed;
  }
}

// The sum of x over the blockDim.x threads of a row, in thread 0 of the row, in a fixed order.
template <typename A, int U>
__device__ void row_sum(A (&x)[U], A (*scratch)[U]) {
  const int width = min(static_cast<int>(blockDim.x), kWarp);
#pragma unroll
  for (int u = 0; u < U; ++u)
    for (int d = width / 2; d; d /= 2) x[u] += __shfl_xor_sync(kAllLanes, x[u], d, width);
  if (blockDim.x <= kWarp) return;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  A(*mine)[U] = scratch + threadIdx.y * warps;
  __syncthreads();
  if (lane_id() == 0)
#pragma unroll
    for (int u = 0; u < U; ++u) mine[warp][u] = x[u];
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < warps; ++w)
#pragma unroll
      for (int u = 0; u < U; ++u) x[u] += mine[w][u];
}

template <typename T, int V>
__device__ void zero_rows(const CombineBackwardParams& p, int64_t first_block) {
  const int64_t step = static_cast<int64_t>(kZeroBlocks) * blockDim.y;
  T* rows = static_cast<T*>(p.grad_rows);
  for (int64_t s = __ldg(p.expert_offsets + p.experts) + (blockIdx.x - first_block) * blockDim.y + threadIdx.y;
       s < p.slots; s += step)
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; c < p.hidden; c += blockDim.x * V)
      *reinterpret_cast<Vec<T, V>*>(rows + s * p.hidden + c) = Vec<T, V>{};
}

// Blocks below `token_blocks` serve tokens, the others clear the rows past the last expert's.
template <typename T, int V, int U, bool kRows, bool kWeights>
__global__ void __launch_bounds__(kThreads, 2)
    combine_backward_kernel(const CombineBackwardParams p, int64_t token_blocks) {
  using A = Acc<T>;
  __shared__ A scratch[kWeights ? kThreads / kWarp : 1][U];
  if (blockIdx.x >= token_blocks) return zero_rows<T, V>(p, token_blocks);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = t < p.tokens;
  const T* grad_output = static_cast<const T*>(p.grad_output) + (active ? t : 0) * p.hidden;
  for (int k0 = 0; k0 < p.top_k; k0 += U) {
    const Picks<A, U> picks(p.token_slot, kRows ? static_cast<const A*>(p.weights) : nullptr, t, k0, p.top_k, active);
    A dot[U] = {};
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * V; active && c < p.hidden; c += blockDim.x * V) {
      const Vec<T, V> g = *reinterpret_cast<const Vec<T, V>*>(grad_output + c);
      if constexpr (kWeights) {
        Vec<T, V> row[U];
#pragma unroll
        for (int u = 0; u < U; ++u)
          row[u] = picks.slot[u] >= 0 ? load_once<T, V>(static_cast<const T*>(p.rows) + picks.slot[u] * p.hidden + c)
                                      : Vec<T, V>{};
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
          for (int v = 0; v < V; ++v) dot[u] += to_acc(g.v[v]) * to_acc(row[u].v[v]);
      }
      if constexpr (kRows) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (picks.slot[u] < 0) continue;
          Vec<T, V> scaled = g;
          if (p.weights)
#pragma unroll
            for (int v = 0; v < V; ++v) scaled.v[v] = from_acc<T>(picks.weight[u] * to_acc(g.v[v]));
          *reinterpret_cast<Vec<T, V>*>(static_cast<T*>(p.grad_rows) + picks.slot[u] * p.hidden + c) = scaled;
        }
      }
    }
    if constexpr (kWeights) {
      row_sum(dot, scratch);
      if (active && threadIdx.x == 0)
#pragma unroll
        for (int u = 0; u < U; ++u)
          if (k0 + u < p.top_k)  // a NaN in grad_output must not reach a dropped pair
            static_cast<A*>(p.grad_weights)[t * p.top_k + k0 + u] = picks.slot[u] >= 0 ? dot[u] : A(0);
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) slots_to_pairs_kernel(const SlotsToPairsParams p) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= p.pairs) return;
  const int32_t slot = p.token_slot[pair];
  static_cast<A*>(p.by_pair)[pair] = slot >= 0 ? static_cast<const A*>(p.by_slot)[slot] : A(0);
}

// f(vector width) for rows of `hidden` elements: 16 bytes where every row starts on 16 bytes, one element otherwise.
template <typename T, typename F>
cudaError_t with_width(int64_t hidden, std::initializer_list<const void*> rows, F&& f) {
  const bool wide = hidden % kVector<T> == 0 &&
                    std::all_of(rows.begin(), rows.end(), [](const void* p) { return aligned_to(p, 16); });
  return wide ? f(std::integral_constant<int, kVector<T>>{}) : f(std::integral_constant<int, 1>{});
}

// f(U): how many of a token's K rows are in flight together. The slow width has one variant, to keep the build short.
template <int V, typename F>
cudaError_t with_unroll(int top_k, F&& f) {
  if constexpr (V > 1) {
    if (top_k == 1) return f(std::integral_constant<int, 1>{});
    if (top_k == 2) return f(std::integral_constant<int, 2>{});
    if (top_k <= 4) return f(std::integral_constant<int, 4>{});
  }
  return f(std::integral_constant<int, 8>{});
}

}  // namespace

cudaError_t combine(const CombineParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.hidden == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_width<T>(p.hidden, {p.rows, p.out}, [&](auto width) {
      return with_unroll<width()>(p.top_k, [&](auto unroll) {
        const dim3 block = row_block(p.hidden / width());
        return launch_waiting<combine_kernel<T, width(), unroll()>>(ceil_div(p.tokens, block.y), block, 0, stream, p);
      });
    });
  });
}

cudaError_t combine_backward(const CombineBackwardParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || (!p.grad_rows && !p.grad_weights)) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_width<T>(p.hidden, {p.grad_output, p.rows, p.grad_rows}, [&](auto width) {
      return with_unroll<width()>(p.top_k, [&](auto unroll) {
        constexpr int V = width(), U = unroll();
        const dim3 block = row_block(p.hidden / V);
        const int64_t token_blocks = ceil_div(p.tokens, block.y);
        const int64_t blocks = token_blocks + (p.grad_rows ? kZeroBlocks : 0);
        if (!p.grad_weights)
          return launch(combine_backward_kernel<T, V, U, true, false>, blocks, block, 0, stream, p, token_blocks);
        if (!p.grad_rows)
          return launch(combine_backward_kernel<T, V, U, false, true>, blocks, block, 0, stream, p, token_blocks);
        return launch(combine_backward_kernel<T, V, U, true, true>, blocks, block, 0, stream, p, token_blocks);
      });
    });
  });
}

cudaError_t slots_to_pairs(const SlotsToPairsParams& p, cudaStream_t stream) {
  if (p.pairs == 0) return cudaSuccess;
  const auto run = [&](auto kernel) { return launch(kernel, ceil_div(p.pairs, kThreads), kThreads, 0, stream, p); };
  return p.dtype == DType::f64 ? run(slots_to_pairs_kernel<double>) : run(slots_to_pairs_kernel<float>);
}

}  // namespace fastmoe_cpp::cuda
