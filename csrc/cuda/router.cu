#include <algorithm>

#include "route_token.cuh"

namespace fastmoe_cpp::cuda {
namespace {

constexpr size_t kSharedBytes = 48 * 1024;
constexpr int kWarps = 4;  // tokens a block, where shared memory allows

// One warp a token. The blocks asked for are what hides the latency of one token's chain of rounds.
template <typename T, int N>
__global__ void __launch_bounds__(kWarps* kWarp, sizeof(Acc<T>) == 8 ? 1
                                                 : N <= 4            ? 10
                                                 : N == 32           ? 4
                                                                     : 1)
    route_kernel(const RouteParams p, const RouteLayout layout, const bool wide) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / kWarp;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (t < p.tokens) route_token<T, N>(p, layout, shared + warp * layout.bytes, t, wide);
}

// One warp a token. adds[e] collects, in order of k, what the selected experts' weights ask of e's score (of its logit
// under after_topk); score_row's derivative then takes scores to logits.
template <typename T, int N>
__global__ void __launch_bounds__(kWarps* kWarp) route_backward_kernel(const RouteBackwardParams p, const bool wide) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = lane_id(), warp = threadIdx.x / kWarp, first = lane * N;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (t >= p.tokens) return;
  const int padded = (p.experts + 3) / 4 * 4;
  A* values = reinterpret_cast<A*>(shared) + warp * 2 * padded;
  A* adds = values + padded;
  const T* row = static_cast<const T*>(p.logits) + t * p.experts;
  const Weighting& w = p.weighting;

  A logit[N], score[N], grad[N];
  load_mine<N>(row, first, p.experts, wide, logit);
  if (score_row(w.score, logit, score)) fill(score, A(NAN));
  store_mine<N>(values, first, p.experts, wide, score);
  fill(grad, A(0));
  store_mine<N>(adds, first, p.experts, wide, grad);
  __syncwarp();

  if (p.grad_topk_weights) {
    const int64_t* ids = p.topk_ids + t * p.top_k;
    const A* grad_weights = static_cast<const A*>(p.grad_topk_weights) + t * p.top_k;
    for (int k = lane; k < p.top_k; k += kWarp) require_expert_id(t * p.top_k + k, ids[k], p.experts);
    const auto id_of = [&](int k) { return static_cast<int>(ids[k]); };
    const Selected selected(w, p.top_k, id_of, values, row);
    const auto sum_over = [&](auto&& term) {
      A sum = 0;
      for (int k = lane; k < p.top_k; k += kWarp)
        if (id_of(k) >= 0) sum += term(k);
      return warp_sum(sum);
    };
    const A scaling = static_cast<A>(w.scaling);
    A mean = 0, inner = 0;
    if (w.renormalize)
      mean = sum_over([&](int k) { return grad_weights[k] * scaling * (selected.value(id_of(k)) / selected.total); });
    const auto grad_value = [&](int k) { return (grad_weights[k] * scaling - mean) / selected.total; };
    const bool softmax_after = w.after_topk && w.score == Score::softmax;
    if (softmax_after) inner = sum_over([&](int k) { return grad_value(k) * selected.value(id_of(k)); });
    for (int k0 = 0; k0 < p.top_k; k0 += kWarp) {
      int id = -1;
      A add = 0;
      if (k0 + lane < p.top_k) {
        id = id_of(k0 + lane);
        if (id >= 0) {
          add = grad_value(k0 + lane);
          const A value = selected.value(id);
          if (softmax_after)
            add = value * (add - inner);
          else if (w.after_topk)
            add *= score_slope(w.score, to_acc(row[id]), value);
        }
      }
      for (int j = 0; j < min(kWarp, p.top_k - k0); ++j) {  // in order of k; ids may repeat
        const int to = __shfl_sync(kAllLanes, id, j);
        const A much = __shfl_sync(kAllLanes, add, j);
        if (to >= 0 && to % kWarp == lane) adds[to] += much;
      }
    }
    __syncwarp();
  }

  A direct[N];
  load_mine<N>(adds, first, p.experts, wide, direct);
  if (p.grad_scores) load_mine<N>(static_cast<const A*>(p.grad_scores) + t * p.experts, first, p.experts, wide, grad);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i >= p.experts) direct[i] = grad[i] = 0;
    if (!w.after_topk) grad[i] += direct[i], direct[i] = 0;
  }
  if (p.grad_scores || !w.after_topk) {
    A inner = 0;
    if (w.score == Score::softmax) {
#pragma unroll
      for (int i = 0; i < N; ++i) inner += grad[i] * score[i];
      inner = warp_sum(inner);
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
      direct[i] +=
          w.score == Score::softmax ? score[i] * (grad[i] - inner) : grad[i] * score_slope(w.score, logit[i], score[i]);
  }
  store_mine<N>(static_cast<T*>(p.grad_logits) + t * p.experts, first, p.experts, wide, direct);
}

__global__ void __launch_bounds__(256) split_bf16_kernel(const SplitParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= p.outer * p.inner) return;
  float rest = p.in[i];
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.out) + i / p.inner * p.parts * p.inner + i % p.inner;
  for (int part = 0; part < p.parts; ++part) {
    const __nv_bfloat16 x = __float2bfloat16_rn(rest);
    out[part * p.inner] = x;
    // infinite or NaN: all of it is in the first part
    rest = isfinite(__bfloat162float(x)) ? rest - __bfloat162float(x) : 0.0f;
  }
}

}  // namespace

cudaError_t route(const RouteParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const RouteLayout layout = route_layout(p, sizeof(Acc<T>));
    const int warps = std::min<int>(kWarps, kSharedBytes / layout.bytes);
    return with_experts<T>(p.experts, [&](auto n) {
      const bool wide = rows_are_wide<T, n()>(p.experts, {p.logits}, {p.scores, p.selection_scores, p.expert_bias});
      return launch(route_kernel<T, n()>, ceil_div(p.tokens, warps), warps * kWarp, warps * layout.bytes, stream, p,
                    layout, wide);
    });
  });
}

cudaError_t route_backward(const RouteBackwardParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const size_t bytes = 2 * ((p.experts + 3) / 4 * 4) * sizeof(Acc<T>);
    const int warps = std::min<int>(kWarps, kSharedBytes / bytes);
    return with_experts<T>(p.experts, [&](auto n) {
      const bool wide = rows_are_wide<T, n()>(p.experts, {p.logits, p.grad_logits}, {p.grad_scores});
      return launch(route_backward_kernel<T, n()>, ceil_div(p.tokens, warps), warps * kWarp, warps * bytes, stream, p,
                    wide);
    });
  });
}

cudaError_t split_bf16(const SplitParams& p, cudaStream_t stream) {
  if (p.outer * p.inner == 0) return cudaSuccess;
  return launch(split_bf16_kernel, ceil_div(p.outer * p.inner, 256), 256, 0, stream, p);
}

}  // namespace fastmoe_cpp::cuda
