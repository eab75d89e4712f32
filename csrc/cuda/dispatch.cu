// A pair's slot is the start of its expert, plus the pairs of that expert in earlier blocks, in earlier warps of the
// block, in earlier steps of the warp, and in lower lanes: integer counts only, so the plan is stable and repeatable.
#include "dispatch.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <limits>

#include "device.cuh"

namespace fastmoe_cpp::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSteps = 4;                 // of 32 pairs that a warp has in flight
constexpr int64_t kOneBlockPairs = 2048;  // up to here one block does it all
constexpr int64_t kBlockPairs = 512;      // the fewest pairs for which another block is taken
constexpr int kMaxBlocksALane = 8;        // of the counts that scan_blocks holds
constexpr int kSelectThreads = 1024;
constexpr int kRun = 4;  // keys a thread has in flight

// counts[warps][E], offset[E + 1]
size_t shared_for(int experts) { return (static_cast<size_t>(kWarps) * experts + experts + 1) * sizeof(int); }

// The lanes whose expert is this lane's, by one vote a bit; meaningless where expert is -1.
template <int kBits>
__device__ __forceinline__ unsigned lanes_with(int expert) {
  unsigned same = __ballot_sync(kAllLanes, expert >= 0);
#pragma unroll
  for (int b = 0; b < kBits; ++b) {
    const bool set = expert >> b & 1;
    const unsigned votes = __ballot_sync(kAllLanes, set);
    same &= set ? votes : ~votes;
  }
  return same;
}

// The part of the pairs that one warp walks: batches of kSteps steps of 32 pairs.
template <typename Id, int kBits>
struct Walk {
  const DispatchParams& p;
  int64_t begin, end;  // this warp's pairs
  bool one_batch;      // whether every warp's pairs are one batch, which then stays in registers

  __device__ explicit Walk(const DispatchParams& p) : p(p) {
    const int64_t pairs = p.tokens * p.top_k, warps = static_cast<int64_t>(gridDim.x) * kWarps;
    const int64_t steps = (pairs + warps * kWarp - 1) / (warps * kWarp);
    one_batch = steps <= kSteps;
    begin = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * steps * kWarp;
    end = min(begin + steps * kWarp, pairs);
  }

  // The experts of the batch that starts at `start`: -1 where a pair is dropped or past the end.
  __device__ void load(int64_t start, int (&expert)[kSteps]) const {
    const Id* ids = static_cast<const Id*>(p.topk_ids);
    int64_t id[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t pair = start + s * kWarp + lane_id();
      id[s] = pair < end ? static_cast<int64_t>(ids[pair]) : -1;
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t pair = start + s * kWarp + lane_id();
      require_expert_id(pair, id[s], p.experts);
      expert[s] = static_cast<int>(id[s]);
      if (p.padding_mask && id[s] >= 0 && p.padding_mask[static_cast<unsigned>(pair) / static_cast<unsigned>(p.top_k)])
        expert[s] = -1;
    }
  }

  // rank[s] = the pairs of the expert that mine[expert] counts already and those before this one in the batch, which
  // mine[] then counts too. By all lanes together.
  __device__ void rank(const int (&expert)[kSteps], int* mine, int (&rank)[kSteps]) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const unsigned same = lanes_with<kBits>(expert[s]);
      const int leader = __ffs(same) - 1;
      int before = 0;
      if (expert[s] >= 0 && lane_id() == leader) {
        before = mine[expert[s]];
        mine[expert[s]] = before + __popc(same);
      }
      rank[s] = __shfl_sync(kAllLanes, before, leader & (kWarp - 1)) + __popc(same & ((1u << lane_id()) - 1));
      __syncwarp();
    }
  }
};

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

// The sum of x over the threads before this one, and over all. `scratch` holds a number a warp; all threads call it.
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
__device__ void expert_offsets(const int64_t* tokens_per_expert, int experts, int64_t capacity, int* offset,
                               int* scratch) {
  constexpr int kMost = 1024 / kThreads;
  const int first = threadIdx.x * kMost;
  int kept[kMost], sum = 0;
#pragma unroll
  for (int i = 0; i < kMost; ++i)
    sum += kept[i] = first + i < experts ? static_cast<int>(min(tokens_per_expert[first + i], capacity)) : 0;
  int at = sum_before(sum, scratch);
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (first + i < experts) offset[first + i] = at;
    at += kept[i];
    if (first + i == experts - 1) offset[experts] = at;
  }
  __syncthreads();
}

// By one warp an expert across the grid: block_counts[b][e] becomes the sum over the blocks before b, and
// tokens_per_expert the sum over all.
__device__ void scan_blocks(const DispatchParams& p) {
  const int blocks = gridDim.x, rows = (blocks + kWarp - 1) / kWarp;
  for (int expert = blockIdx.x + threadIdx.x / kWarp * blocks; expert < p.experts; expert += blocks * kWarps) {
    int* column = p.block_counts + expert;
    const int first = lane_id() * rows;
    int count[kMaxBlocksALane], sum = 0;
#pragma unroll
    for (int r = 0; r < kMaxBlocksALane; ++r)
      count[r] = r < rows && first + r < blocks ? column[static_cast<int64_t>(first + r) * p.experts] : 0;
#pragma unroll
    for (int r = 0; r < kMaxBlocksALane; ++r) sum += count[r];
    int at = warp_sum_before(sum);
#pragma unroll
    for (int r = 0; r < kMaxBlocksALane; ++r) {
      if (r < rows && first + r < blocks) column[static_cast<int64_t>(first + r) * p.experts] = at;
      at += count[r];
    }
    if (lane_id() == kWarp - 1) p.tokens_per_expert[expert] = at;
  }
}

// Blocks of a grid of more than one are all resident (a cooperative launch): they count, sum up over blocks, and place.
template <typename Id, int kBits>
__global__ void __launch_bounds__(kThreads) plan_kernel(const DispatchParams p) {
  extern __shared__ int counts[];
  __shared__ int scratch[kWarp];
  int* offset = counts + kWarps * p.experts;
  int* mine = counts + threadIdx.x / kWarp * p.experts;
  const int64_t pairs = p.tokens * p.top_k;
  const Walk<Id, kBits> walk(p);
  int expert[kSteps], rank[kSteps];

  for (int i = threadIdx.x; i < kWarps * p.experts; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int64_t start = walk.begin; start < walk.end; start += kSteps * kWarp) {
    walk.load(start, expert);
    walk.rank(expert, mine, rank);
  }
  __syncthreads();
  if (gridDim.x > 1) {
    const auto grid = cooperative_groups::this_grid();
    for (int e = threadIdx.x; e < p.experts; e += kThreads) {
      int sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += counts[w * p.experts + e];
      p.block_counts[static_cast<int64_t>(blockIdx.x) * p.experts + e] = sum;
    }
    grid.sync();
    scan_blocks(p);
    grid.sync();
  }
  // counts[w][e] becomes the rank, within its expert, of the warp's first pair of e
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    int at = gridDim.x > 1 ? p.block_counts[static_cast<int64_t>(blockIdx.x) * p.experts + e] : 0, count[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) count[w] = counts[w * p.experts + e];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      counts[w * p.experts + e] = at;
      at += count[w];
    }
    if (gridDim.x == 1) p.tokens_per_expert[e] = at;
  }
  __syncthreads();
  if (p.by_weight && blockIdx.x == 0) {
    expert_offsets(p.tokens_per_expert, p.experts, p.capacity, offset, scratch);
    for (int e = threadIdx.x; e <= p.experts; e += kThreads) p.expert_offsets[e] = offset[e];
    __syncthreads();
  }
  const int64_t capacity = p.by_weight ? pairs : p.capacity;
  expert_offsets(p.tokens_per_expert, p.experts, capacity, offset, scratch);
  if (blockIdx.x == 0)
    for (int e = threadIdx.x; e <= p.experts; e += kThreads)
      (p.by_weight ? p.uncapped_offsets : p.expert_offsets)[e] = offset[e];

  const int served = offset[p.experts];
  for (int64_t start = walk.begin; start < walk.end; start += kSteps * kWarp) {
    if (walk.one_batch) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) rank[s] += expert[s] >= 0 ? mine[expert[s]] : 0;
    } else {
      walk.load(start, expert);
      walk.rank(expert, mine, rank);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t pair = start + s * kWarp + lane_id();
      if (pair >= walk.end) continue;
      if (p.by_weight) {
        if (expert[s] < 0)
          p.token_slot[pair] = -1;
        else
          p.pairs_by_expert[offset[expert[s]] + rank[s]] = static_cast<int>(pair);
      } else {
        const int slot = expert[s] >= 0 && rank[s] < capacity ? offset[expert[s]] + rank[s] : -1;
        p.token_slot[pair] = slot;
        if (slot >= 0) p.slot_index[slot] = static_cast<int>(pair);
        if (pair >= served) p.slot_index[pair] = -1;
      }
    }
  }
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
  if (ties_wanted == 0)
    threshold = ~Key<W>(0);
  else if (ties_wanted < n)
    threshold = nth_largest<Key<W>>(n, ties_wanted, key_at, histogram, digit_and_above);
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

template <typename Id, int kBits>
cudaError_t plan(const DispatchParams& p, int64_t blocks, cudaStream_t stream) {
  const auto kernel = plan_kernel<Id, kBits>;
  const size_t bytes = shared_for(p.experts);
  if (const auto e = allow_shared_memory<plan_kernel<Id, kBits>>(bytes)) return e;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = blocks > 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t dispatch_blocks(int64_t pairs, int64_t* blocks) {
  *blocks = 1;
  if (pairs <= kOneBlockPairs) return cudaSuccess;
  int device, processors;
  if (const auto e = cudaGetDevice(&device)) return e;
  if (const auto e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  *blocks = std::min<int64_t>({ceil_div(pairs, kBlockPairs), processors, kWarp * kMaxBlocksALane});
  return cudaSuccess;
}

cudaError_t dispatch(const DispatchParams& params, cudaStream_t stream) {
  DispatchParams p = params;
  const int64_t pairs = p.tokens * p.top_k;
  int64_t blocks;
  if (const auto e = dispatch_blocks(pairs, &blocks)) return e;
  p.by_weight = p.by_weight && p.capacity >= 0 && p.capacity < pairs;
  if (p.capacity < 0) p.capacity = std::numeric_limits<int32_t>::max();
  const auto with_bits = [&](auto id) {
    using Id = decltype(id);
    if (p.experts <= 16) return plan<Id, 4>(p, blocks, stream);
    return p.experts <= 128 ? plan<Id, 7>(p, blocks, stream) : plan<Id, 10>(p, blocks, stream);
  };
  if (const auto e = p.wide_ids ? with_bits(int64_t{}) : with_bits(int32_t{})) return e;
  if (!p.by_weight) return cudaSuccess;
  return p.wide_weights ? launch(keep_heaviest_kernel<double>, p.experts, kSelectThreads, 0, stream, p)
                        : launch(keep_heaviest_kernel<float>, p.experts, kSelectThreads, 0, stream, p);
}

}  // namespace fastmoe_cpp::cuda
