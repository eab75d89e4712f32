// What a few tokens need before their experts, by one cluster of blocks: its warps share out the experts' logits, a warp a
// token chooses, and a block counts the pairs. Three launches' work is so little that their starts are most of it.
#include <algorithm>
#include <limits>

#include "hopper_launch.cuh"
#include "route_token.cuh"

namespace fastmoe_cpp::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 8;        // of the cluster
constexpr int kTileLogits = 128;  // of a tile of a matrix product
constexpr int kPartBytes = kWarps * kTileLogits * sizeof(float);
constexpr int kSharedBytes = 47 * 1024;
static_assert(kMaxFewTokens <= kWarps && kMaxFewPairs <= kThreads);

__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// sum += a [16, 16] @ b [16, 8], in the fragments of mma.m16n8k16.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// logits[t, e] of 16-bit operands by tensor cores: tiles of 16 experts by 8 tokens, of which a block's warps share out the
// contraction and whose parts are added in the order of the warps.
template <typename T>
__device__ void multiply_tiles(const FewLogitsParams& p, float (*parts)[kTileLogits]) {
  constexpr int kExperts = 16, kTokens = kTileLogits / kExperts, kStep = 32, kAhead = 4;
  static_assert(kMaxFewTokens == kTokens && kTileLogits <= kThreads);
  const int warp = threadIdx.x / kWarp, row = lane_id() / 4, hidden = static_cast<int>(p.hidden);
  const int tokens = static_cast<int>(p.tokens);
  const auto load = [&](const void* rows, int at, int end, int k) {
    if (at >= end || k >= hidden) return uint4{};
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(rows) + int64_t{at} * hidden + k);
  };
  for (int first = blockIdx.x * kExperts; first < p.experts; first += gridDim.x * kExperts) {
    float sum[4] = {};
    // A lane takes 8 neighbours of k of its rows; both operands in the same order, so any order is a sum over k.
    for (int base = warp * kStep; base < hidden; base += kWarps * kStep * kAhead) {
      uint4 low[kAhead], high[kAhead], x[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = base + i * kWarps * kStep + lane_id() % 4 * 8;
        low[i] = load(p.weight, first + row, p.experts, at);
        high[i] = load(p.weight, first + row + 8, p.experts, at);
        x[i] = load(p.hidden_states, row, tokens, at);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        multiply_add<T>(sum, low[i].x, high[i].x, low[i].y, high[i].y, x[i].x, x[i].y);
        multiply_add<T>(sum, low[i].z, high[i].z, low[i].w, high[i].w, x[i].z, x[i].w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[warp][(row + i / 2 * 8) * kTokens + lane_id() % 4 * 2 + i % 2] = sum[i];
    __syncthreads();
    const int expert = first + static_cast<int>(threadIdx.x) / kTokens, token = threadIdx.x % kTokens;
    if (threadIdx.x < kTileLogits && expert < p.experts && token < tokens) {
      float logit = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) logit += parts[w][threadIdx.x];
      p.logits[int64_t{token} * p.experts + expert] = p.bias ? logit + p.bias[expert] : logit;
    }
    __syncthreads();
  }
}

// The same with a float32 weight, which tensor cores would round: an expert a warp.
template <typename X>
__device__ void multiply_rows(const FewLogitsParams& p) {
  constexpr int V = 4, kStep = V * kWarp, kAhead = 8;
  const int tokens = static_cast<int>(p.tokens), hidden = static_cast<int>(p.hidden);
  for (int e = threadIdx.x / kWarp * gridDim.x + blockIdx.x; e < p.experts; e += kWarps * gridDim.x) {
    const float* const row = static_cast<const float*>(p.weight) + int64_t{e} * hidden;
#pragma unroll 1  // the row comes from L1 again
    for (int t = 0; t < tokens; ++t) {
      const X* const mine = static_cast<const X*>(p.hidden_states) + int64_t{t} * hidden;
      float sum = 0;
#pragma unroll 1
      for (int begin = lane_id() * V; begin < hidden; begin += kAhead * kStep) {
        Vec<X, V> a[kAhead];  // all on their way before the first is needed
        Vec<float, V> b[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const bool inside = begin + i * kStep < hidden;
          a[i] = inside ? *reinterpret_cast<const Vec<X, V>*>(mine + begin + i * kStep) : Vec<X, V>{};
          b[i] = inside ? *reinterpret_cast<const Vec<float, V>*>(row + begin + i * kStep) : Vec<float, V>{};
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
#pragma unroll
          for (int v = 0; v < V; ++v) sum = fmaf(to_acc(a[i].v[v]), b[i].v[v], sum);
      }
      sum = warp_sum(sum);
      if (lane_id() == 0) p.logits[int64_t{t} * p.experts + e] = p.bias ? sum + p.bias[e] : sum;
    }
  }
}

// By all threads of all blocks; shared: kPartBytes of each.
__device__ __forceinline__ void multiply(const FewLogitsParams& p, unsigned char* shared) {
  const auto parts = reinterpret_cast<float (*)[kTileLogits]>(shared);
  if (p.weight_type == DType::bf16) return multiply_tiles<__nv_bfloat16>(p, parts);
  if (p.weight_type == DType::f16) return multiply_tiles<__half>(p, parts);
  if (p.hidden_type == DType::bf16) return multiply_rows<__nv_bfloat16>(p);
  if (p.hidden_type == DType::f16) return multiply_rows<__half>(p);
  multiply_rows<float>(p);
}

__global__ void __launch_bounds__(kThreads) logits_kernel(const FewLogitsParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  multiply(p, shared);
}

// By one block: a pair's slot is the number of pairs of lower experts, and of earlier pairs of its own.
__device__ __forceinline__ void plan(const RouteFewParams& p, int* ids) {
  const int pairs = static_cast<int>(p.route.tokens) * p.route.top_k;
  if (threadIdx.x < pairs) ids[threadIdx.x] = static_cast<int>(p.route.topk_ids[threadIdx.x]);
  __syncthreads();
  for (int e = threadIdx.x; e <= p.route.experts; e += kThreads) {
    int lower = 0, own = 0;
    for (int i = 0; i < pairs; ++i) lower += ids[i] < e, own += ids[i] == e;
    p.expert_offsets[e] = lower;
    if (e < p.route.experts) p.tokens_per_expert[e] = own;
  }
  if (threadIdx.x < pairs) {
    const int pair = threadIdx.x, id = ids[pair];
    int slot = 0;
    for (int i = 0; i < pairs; ++i) slot += ids[i] < id || (ids[i] == id && i < pair);
    p.token_slot[pair] = slot;
    p.slot_index[slot] = pair;
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads, 1)
    route_few_kernel(const RouteFewParams p, const RouteLayout layout, const bool wide) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int ids[kMaxFewPairs];
  launch_next_kernel();  // which waits for the end of this one before it reads anything
  multiply(p.logits, shared);
  sync_cluster();
  if (blockIdx.x != 0) return;
  const int warp = threadIdx.x / kWarp;
  if (warp < p.route.tokens) route_token<float, N>(p.route, layout, shared + warp * layout.bytes, warp, wide);
  __syncthreads();
  plan(p, ids);
}

}  // namespace

cudaError_t takes_logits_of_few(const FewLogitsParams& p, bool* taken) {
  const bool types = p.hidden_type != DType::f64 && (p.weight_type == DType::f32 || p.weight_type == p.hidden_type);
  *taken = p.tokens >= 1 && p.tokens <= kMaxFewTokens && types && p.experts >= 1 && p.hidden >= 8 &&
           p.hidden % 8 == 0 && p.hidden < std::numeric_limits<int>::max() / 2 && aligned_to(p.hidden_states, 16) &&
           aligned_to(p.weight, 16);
  return *taken ? is_hopper_code<logits_kernel>(taken) : cudaSuccess;
}

cudaError_t logits_of_few(const FewLogitsParams& p, cudaStream_t stream) {
  return launch(logits_kernel, ceil_div(p.experts, kWarps), kThreads, kPartBytes, stream, p);
}

cudaError_t takes_route_few(const RouteFewParams& p, bool* taken) {
  if (const auto e = takes_logits_of_few(p.logits, taken)) return e;
  *taken = *taken && p.route.tokens * p.route.top_k <= kMaxFewPairs &&
           p.route.tokens * route_layout(p.route, sizeof(float)).bytes <= kSharedBytes;
  return cudaSuccess;
}

cudaError_t route_few(const RouteFewParams& p, cudaStream_t stream) {
  const RouteLayout layout = route_layout(p.route, sizeof(float));
  return with_experts<float>(p.route.experts, [&](auto n) {
    const bool wide =
        rows_are_wide<float, n()>(p.route.experts, {p.logits.logits}, {p.route.scores, p.route.expert_bias});
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kBlocks, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kBlocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = std::max<int64_t>(p.route.tokens * layout.bytes, kPartBytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, route_few_kernel<n()>, p, layout, wide);
  });
}

}  // namespace fastmoe_cpp::cuda
