// A pair's slot is the start of its expert, plus the pairs of that expert in earlier blocks, in earlier warps of the
// block, in earlier steps of the warp, and in lower lanes: integer counts only, so the plan is stable and repeatable.
#include "dispatch.h"

#include <algorithm>
#include <limits>

#include "device.cuh"

namespace fastmoe_cpp::cuda {
namespace {

constexpr int64_t kOneBlockPairs = 8192;  // up to here one block does it all
constexpr int64_t kBlockPairs = 2048;
constexpr int64_t kMaxBlocks = 1024;
constexpr int kStepsInFlight = 4;
constexpr int kSelectThreads = 1024;
constexpr int kRun = 4;  // keys a thread has in flight

// counts[warps][E] and offset[E + 1] stay within 48 KiB of shared memory.
int warps_for(int experts) { return experts <= 512 ? 16 : 8; }
size_t shared_for(int experts) { return (static_cast<size_t>(warps_for(experts)) * experts + experts + 1) * sizeof(int); }

// The part of the pairs that one warp walks, 32 a step.
struct Walk {
  int64_t begin, end, pairs;
  __device__ Walk(int64_t pairs) : pairs(pairs) {
    const int warps = blockDim.x / kWarp;
    const int64_t warp_pairs = (pairs + gridDim.x * blockDim.x - 1) / (gridDim.x * blockDim.x) * kWarp;
    begin = (static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarp) * warp_pairs;
    end = begin + warp_pairs;
  }

  // f(pair, expert): expert is -1 where the pair is dropped or past the end. All lanes call f together.
  template <typename Id, typename F>
  __device__ void each(const DispatchParams& p, F&& f) const {
    const Id* ids = static_cast<const Id*>(p.topk_ids);
    for (int64_t start = begin; start < end && start < pairs; start += kStepsInFlight * kWarp) {
      int64_t id[kStepsInFlight];
#pragma unroll
      for (int s = 0; s < kStepsInFlight; ++s) {
        const int64_t pair = start + s * kWarp + lane_id();
        id[s] = pair < end && pair < pairs ? static_cast<int64_t>(ids[pair]) : -1;
        require_expert_id(pair, id[s], p.experts);
        if (p.padding_mask && id[s] >= 0 && p.padding_mask[static_cast<unsigned>(pair) / static_cast<unsigned>(p.top_k)])
          id[s] = -1;
      }
#pragma unroll
      for (int s = 0; s < kStepsInFlight; ++s) {
        if (start + s * kWarp >= end) break;
        const int64_t pair = start + s * kWarp + lane_id();
        f(pair, static_cast<int>(id[s]));
      }
    }
  }
};

// The lanes whose expert is this lane's, by one vote a bit; meaningless where expert is -1.
__device__ __forceinline__ unsigned lanes_with(int expert, int bits) {
  unsigned same = __ballot_sync(kAllLanes, expert >= 0);
  for (int b = 0; b < bits; ++b) {
    const bool set = expert >> b & 1;
    const unsigned votes = __ballot_sync(kAllLanes, set);
    same &= set ? votes : ~votes;
  }
  return same;
}

// counts[w][e] = pairs of expert e that warp w walks.
template <typename Id>
__device__ void count_pairs(const DispatchParams& p, const Walk& walk, int bits, int* counts) {
  for (int i = threadIdx.x; i < static_cast<int>(blockDim.x / kWarp) * p.experts; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  int* mine = counts + threadIdx.x / kWarp * p.experts;
  walk.each<Id>(p, [&](int64_t, int expert) {
    const unsigned same = lanes_with(expert, bits);
    if (expert >= 0 && lane_id() == __ffs(same) - 1) mine[expert] += __popc(same);
    __syncwarp();
  });
  __syncthreads();
}

// The sum of x over the lanes before this one.
__device__ __forceinline__ int warp_sum_before(int x) {
  int upto = x;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const int other = __shfl_up_sync(kAllLanes, upto, d);
    if (lane_id() >= d) upto += other;
  }
  return upto - x;
}

// The sum of x over the threads before this one, and over all. `scratch` holds a number a warp; the block calls together.
__device__ int sum_before(int x, int* scratch, int* all = nullptr) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int in_warp = warp_sum_before(x);
  __syncthreads();
  if (lane_id() == kWarp - 1) scratch[warp] = in_warp + x;
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? scratch[w] : 0;
    total += scratch[w];
  }
  if (all) *all = total;
  return before + in_warp;
}

// offset[e] = sum over experts before e of min(tokens_per_expert, capacity), e = 0 .. E.
__device__ void expert_offsets(const int64_t* tokens_per_expert, int experts, int64_t capacity, int* offset, int* scratch) {
  const int run = (experts + blockDim.x - 1) / blockDim.x, first = threadIdx.x * run;
  const auto kept = [&](int e) { return static_cast<int>(min(tokens_per_expert[e], capacity)); };
  int sum = 0;
  for (int e = first; e < min(first + run, experts); ++e) sum += kept(e);
  int at = sum_before(sum, scratch);
  for (int e = first; e < min(first + run, experts); ++e) {
    offset[e] = at;
    at += kept(e);
    if (e == experts - 1) offset[experts] = at;
  }
  __syncthreads();
}

template <typename Id>
__global__ void __launch_bounds__(512) count_kernel(const DispatchParams p, const int bits) {
  extern __shared__ int counts[];
  count_pairs<Id>(p, Walk(p.tokens * p.top_k), bits, counts);
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x / kWarp); ++w) sum += counts[w * p.experts + e];
    p.block_counts[static_cast<int64_t>(e) * gridDim.x + blockIdx.x] = sum;
  }
}

// One warp an expert: the counts of its blocks become the sums before each, and their total tokens_per_expert.
__global__ void __launch_bounds__(256) scan_kernel(const DispatchParams p, const int blocks) {
  const int expert = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp, lane = lane_id();
  if (expert >= p.experts) return;
  int* row = p.block_counts + static_cast<int64_t>(expert) * blocks;
  int carry = 0;
  for (int start = 0; start < blocks; start += kWarp) {
    const int b = start + lane, count = b < blocks ? row[b] : 0;
    const int before = warp_sum_before(count);
    if (b < blocks) row[b] = carry + before;
    carry += __shfl_sync(kAllLanes, before + count, kWarp - 1);
  }
  if (lane == 0) p.tokens_per_expert[expert] = carry;
}

template <typename Id, bool kOneBlock>
__global__ void __launch_bounds__(512) place_kernel(const DispatchParams p, const int bits) {
  extern __shared__ int counts[];
  __shared__ int scratch[kWarp];
  const int warps = blockDim.x / kWarp;
  int* offset = counts + warps * p.experts;
  const int64_t pairs = p.tokens * p.top_k;
  const Walk walk(pairs);
  count_pairs<Id>(p, walk, bits, counts);

  // counts[w][e] becomes the rank, within its expert, of the warp's first pair of e
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int at = kOneBlock ? 0 : p.block_counts[static_cast<int64_t>(e) * gridDim.x + blockIdx.x];
    for (int w = 0; w < warps; ++w) {
      const int count = counts[w * p.experts + e];
      counts[w * p.experts + e] = at;
      at += count;
    }
    if constexpr (kOneBlock) p.tokens_per_expert[e] = at;
  }
  __syncthreads();
  if (p.by_weight && blockIdx.x == 0) {
    expert_offsets(p.tokens_per_expert, p.experts, p.capacity, offset, scratch);
    for (int e = threadIdx.x; e <= p.experts; e += blockDim.x) p.expert_offsets[e] = offset[e];
    __syncthreads();
  }
  const int64_t capacity = p.by_weight ? pairs : p.capacity;
  expert_offsets(p.tokens_per_expert, p.experts, capacity, offset, scratch);
  if (blockIdx.x == 0)
    for (int e = threadIdx.x; e <= p.experts; e += blockDim.x)
      (p.by_weight ? p.uncapped_offsets : p.expert_offsets)[e] = offset[e];

  int* mine = counts + threadIdx.x / kWarp * p.experts;
  const int served = offset[p.experts];
  walk.each<Id>(p, [&](int64_t pair, int expert) {
    const unsigned same = lanes_with(expert, bits);
    const int leader = __ffs(same) - 1;
    int rank = 0;
    if (expert >= 0 && lane_id() == leader) {
      rank = mine[expert];
      mine[expert] = rank + __popc(same);
    }
    rank = __shfl_sync(kAllLanes, rank, leader < 0 ? 0 : leader) + __popc(same & ((1u << lane_id()) - 1));
    __syncwarp();
    if (pair >= pairs) return;
    if (p.by_weight) {
      if (expert < 0) p.token_slot[pair] = -1;
      else p.pairs_by_expert[offset[expert] + rank] = static_cast<int>(pair);
    } else {
      const int slot = expert >= 0 && rank < capacity ? offset[expert] + rank : -1;
      p.token_slot[pair] = slot;
      if (slot >= 0) p.slot_index[slot] = static_cast<int>(pair);
      if (pair >= served) p.slot_index[pair] = -1;
    }
  });
}

// The key of the want-th largest of n keys, by 8 bits a pass from the top; `want` becomes how many keys equal to it are
// among the largest. Counts are integers, so shared-memory atomics give the same histogram in any order.
template <typename K, typename KeyAt>
__device__ K nth_largest(int n, int& want, KeyAt key_at, int* histogram, int* digit_and_above) {
  K prefix = 0, mask = 0;
  for (int shift = sizeof(K) * 8 - 8; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    for (int64_t start = threadIdx.x; start - threadIdx.x < n; start += kRun * blockDim.x) {
      K key[kRun];
#pragma unroll
      for (int r = 0; r < kRun; ++r) key[r] = start + r * blockDim.x < n ? key_at(start + r * blockDim.x) : 0;
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        const int digit = key[r] != 0 && (key[r] & mask) == prefix ? static_cast<int>(key[r] >> shift & 0xff) : -1;
        int all_equal;  // most leading digits are the same: one add for the warp
        const unsigned lanes = __match_all_sync(kAllLanes, digit, &all_equal);
        if (digit >= 0 && (!all_equal || lane_id() == 0)) atomicAdd(histogram + digit, all_equal ? __popc(lanes) : 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {  // lane l sums the 8 digits from 255 - 8 l downwards
      int mine[8], sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += mine[i] = histogram[255 - 8 * lane_id() - i];
      int above = warp_sum_before(sum);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (above < want && want <= above + mine[i]) {
          digit_and_above[0] = 255 - 8 * lane_id() - i;
          digit_and_above[1] = above;
        }
        above += mine[i];
      }
    }
    __syncthreads();
    prefix |= static_cast<K>(digit_and_above[0]) << shift;
    mask |= static_cast<K>(0xff) << shift;
    want -= digit_and_above[1];
    __syncthreads();
  }
  return prefix;
}

// One block an expert: of its pairs, which are in order, keeps the `capacity` heaviest in that order.
template <typename W>
__global__ void __launch_bounds__(kSelectThreads) keep_heaviest_kernel(const DispatchParams p) {
  __shared__ int histogram[256], digit_and_above[2], scratch[kWarp];
  const W* weights = static_cast<const W*>(p.topk_weights);
  const int64_t pairs = p.tokens * p.top_k, all_threads = static_cast<int64_t>(gridDim.x) * kSelectThreads;
  const int expert = blockIdx.x, first = p.uncapped_offsets[expert], n = p.uncapped_offsets[expert + 1] - first;
  const int target = p.expert_offsets[expert];
  for (int64_t s = p.expert_offsets[p.experts] + static_cast<int64_t>(expert) * kSelectThreads + threadIdx.x; s < pairs;
       s += all_threads)
    p.slot_index[s] = -1;

  const int32_t* mine = p.pairs_by_expert + first;
  const auto key_at = [&](int64_t i) { return ordered_key(weights[mine[i]]); };
  int ties_wanted = static_cast<int>(min(static_cast<int64_t>(n), p.capacity));
  Key<W> threshold = 0;  // below every key: keep all
  if (ties_wanted == 0) threshold = ~Key<W>(0);
  else if (ties_wanted < n) threshold = nth_largest<Key<W>>(n, ties_wanted, key_at, histogram, digit_and_above);
  int heavier_before = 0, ties_before = 0;  // the chunk
  for (int64_t start = 0; start < n; start += kRun * kSelectThreads) {
    const int64_t i = start + threadIdx.x * kRun;  // a thread takes kRun pairs in a row
    Key<W> key[kRun];
    int heavier = 0, ties = 0;
#pragma unroll
    for (int r = 0; r < kRun; ++r) key[r] = i + r < n ? key_at(i + r) : 0;
#pragma unroll
    for (int r = 0; r < kRun; ++r) heavier += i + r < n && key[r] > threshold, ties += i + r < n && key[r] == threshold;
    int total;  // at most kRun * kSelectThreads of each: 16 bits do
    const int before = sum_before(heavier << 16 | ties, scratch, &total);
    int heavier_so_far = heavier_before + (before >> 16), ties_so_far = ties_before + (before & 0xffff);
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      if (i + r >= n) break;
      const bool kept = key[r] > threshold || (key[r] == threshold && ties_so_far < ties_wanted);
      const int slot = kept ? target + heavier_so_far + min(ties_so_far, ties_wanted) : -1;
      heavier_so_far += key[r] > threshold, ties_so_far += key[r] == threshold;
      p.token_slot[mine[i + r]] = slot;
      if (kept) p.slot_index[slot] = mine[i + r];
    }
    heavier_before += total >> 16, ties_before += total & 0xffff;
  }
}

}  // namespace

int64_t dispatch_blocks(int64_t pairs) {
  return pairs <= kOneBlockPairs ? 1 : std::min(kMaxBlocks, ceil_div(pairs, kBlockPairs));
}

cudaError_t dispatch(const DispatchParams& params, cudaStream_t stream) {
  DispatchParams p = params;
  const int64_t pairs = p.tokens * p.top_k, blocks = dispatch_blocks(pairs);
  p.by_weight = p.by_weight && p.capacity >= 0 && p.capacity < pairs;
  if (p.capacity < 0) p.capacity = std::numeric_limits<int32_t>::max();
  const int threads = warps_for(p.experts) * kWarp;
  const size_t bytes = shared_for(p.experts);
  int bits = 0;
  while (1 << bits < p.experts) ++bits;

  const auto plan = [&](auto id) -> cudaError_t {
    using Id = decltype(id);
    if (blocks == 1) return launch(place_kernel<Id, true>, 1, threads, bytes, stream, p, bits);
    if (const auto e = launch(count_kernel<Id>, blocks, threads, bytes, stream, p, bits)) return e;
    if (const auto e = launch(scan_kernel, ceil_div(p.experts, 8), 256, 0, stream, p, blocks)) return e;
    return launch(place_kernel<Id, false>, blocks, threads, bytes, stream, p, bits);
  };
  if (const auto e = p.wide_ids ? plan(int64_t{}) : plan(int32_t{})) return e;
  if (!p.by_weight) return cudaSuccess;
  return p.wide_weights ? launch(keep_heaviest_kernel<double>, p.experts, kSelectThreads, 0, stream, p)
                        : launch(keep_heaviest_kernel<float>, p.experts, kSelectThreads, 0, stream, p);
}

}  // namespace fastmoe_cpp::cuda
