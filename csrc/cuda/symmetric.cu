// A warp a row, 16 bytes a lane and several of them in flight: a load from another GPU takes about two microseconds.
#include "symmetric.h"

#include <algorithm>

#include "device.cuh"

namespace fastmoe_cpp::cuda {
namespace {

using symmetric::kControlBytes;
using symmetric::kEpochAt;
using symmetric::kMaxRanks;
using symmetric::kPairsAt;
using symmetric::kRowBytesAt;

constexpr int kMaxExperts = 1024;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kInFlight = 8;  // 16-byte accesses of a lane
constexpr int kBlocksAProcessor = 8;

__device__ __forceinline__ char* base_of(const SymmetricGroup& g, int rank) {
  return reinterpret_cast<char*>(g.peers[rank]);
}

// The operation's number: the counter counts those whose barrier is over.
__device__ __forceinline__ unsigned epoch_of(const SymmetricGroup& g, bool after_barrier) {
  const unsigned done = *reinterpret_cast<const volatile unsigned*>(base_of(g, g.space.rank) + kEpochAt);
  return after_barrier ? done : done + 1;
}

__device__ __forceinline__ char* half_of(const SymmetricGroup& g, int rank, unsigned epoch) {
  return base_of(g, rank) + kControlBytes + (epoch & 1) * g.space.half_bytes;
}

__global__ void __launch_bounds__(kThreads) token_ranks_kernel(const TokenRanksParams p) {
  __shared__ int count[kMaxExperts];
  for (int r = threadIdx.x; r < p.ranks; r += kThreads) count[r] = 0;
  __syncthreads();
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int most = min(p.top_k, p.ranks);
  if (t < p.tokens) {
    int32_t* const to = p.to + t * most;
    int found = 0;
    for (int64_t i = t * p.top_k; i < (t + 1) * p.top_k; ++i) {
      const int slot = p.token_slot[i];
      int id = -1;
      if (slot >= 0) {
        int low = 0, high = p.experts;  // the last expert that begins at or before the slot
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          if (p.expert_offsets[middle] <= slot)
            low = middle;
          else
            high = middle;
        }
        id = low;
        const int rank = id / p.each;
        atomicAdd(count + rank, 1);
        int at = found;
        while (at > 0 && to[at - 1] > rank) --at;
        if (at == 0 || to[at - 1] != rank) {
          for (int j = found++; j > at; --j) to[j] = to[j - 1];
          to[at] = rank;
        }
      }
      p.ids[i] = id;
    }
    while (found < most) to[found++] = -1;
  }
  __syncthreads();
  for (int r = threadIdx.x; r < p.ranks; r += kThreads)
    if (count[r]) atomicAdd(p.pairs + r, count[r]);
}

struct Segment {
  const void* from;
  int64_t to, bytes;  // to: in the half
};
constexpr int kSegments = 6;

template <typename U>
__device__ void copy_units(char* to, const void* from, int64_t bytes, int64_t thread, int64_t threads) {
  const int64_t units = bytes / sizeof(U);
  for (int64_t i = thread; i < units; i += threads)
    reinterpret_cast<U*>(to)[i] = __ldcs(static_cast<const U*>(from) + i);
}

__global__ void __launch_bounds__(kThreads)
    stage_kernel(const SymmetricGroup g, const __grid_constant__ Segment x, const Segment b, const Segment c,
                 const Segment d, const Segment e, const Segment f, int row_bytes) {
  char* half = half_of(g, g.space.rank, epoch_of(g, false));
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const Segment segments[kSegments] = {x, b, c, d, e, f};
#pragma unroll
  for (int i = 0; i < kSegments; ++i) {
    const Segment& s = segments[i];
    const auto address = reinterpret_cast<uintptr_t>(s.from) | static_cast<uintptr_t>(s.to);
    char* to = half + s.to;
    if (address % 16 == 0 && s.bytes % 16 == 0)
      copy_units<int4>(to, s.from, s.bytes, thread, threads);
    else if (address % 4 == 0 && s.bytes % 4 == 0)
      copy_units<int>(to, s.from, s.bytes, thread, threads);
    else
      copy_units<short>(to, s.from, s.bytes, thread, threads);
  }
  if (thread == 0) reinterpret_cast<int*>(half)[kRowBytesAt] = row_bytes;
}

__device__ __forceinline__ void store_release(unsigned* to, unsigned value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* from) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

__device__ __noinline__ void refuse_absence(const SymmetricGroup& g, int other) {
  printf("fastmoe_cpp: %s failed on rank %d of %d: rank %d did not come within %lld ms\n", g.name, g.space.rank,
         g.space.ranks, other, static_cast<long long>(g.space.timeout_ms));
  __trap();
}
__device__ __noinline__ void refuse_row(const SymmetricGroup& g, int other, int theirs, long long ours) {
  printf("fastmoe_cpp: %s: rows of rank %d have %d bytes, those of rank %d %lld\n", g.name, other, theirs, g.space.rank,
         ours);
  __trap();
}
__device__ __noinline__ void refuse_rows(const SymmetricGroup& g, int received, long long max_rows) {
  printf("fastmoe_cpp: %s: rank %d of %d gets %d rows, which is more than max_rows = %lld\n", g.name, g.space.rank,
         g.space.ranks, received, max_rows);
  __trap();
}

// One block, a thread a rank.
__global__ void __launch_bounds__(kMaxRanks) barrier_kernel(const BarrierParams p) {
  const SymmetricGroup& g = p.group;
  __shared__ int count[kMaxRanks], pairs[kMaxRanks];
  const int other = threadIdx.x, ranks = g.space.ranks;
  const unsigned epoch = epoch_of(g, false);
  if (other < ranks) {
    // the kernels before this one on this stream have written; their writes come before the flag
    __threadfence_system();
    store_release(reinterpret_cast<unsigned*>(base_of(g, other)) + g.space.rank, epoch);
    const unsigned* flag = reinterpret_cast<const unsigned*>(base_of(g, g.space.rank)) + other;
    const unsigned long long begin = nanoseconds(),
                             limit = static_cast<unsigned long long>(g.space.timeout_ms) * 1000000;
    while (static_cast<int>(load_acquire(flag) - epoch) < 0)
      if (nanoseconds() - begin > limit) refuse_absence(g, other);
  }
  __syncthreads();
  if (other == 0) *reinterpret_cast<volatile unsigned*>(base_of(g, g.space.rank) + kEpochAt) = epoch;
  if (p.layout == nullptr) return;
  int32_t* start = p.layout + ranks + 1;
  if (other < ranks) {
    const auto* header = reinterpret_cast<const volatile int*>(half_of(g, other, epoch));
    const int first = header[g.space.rank];
    count[other] = header[g.space.rank + 1] - first;
    pairs[other] = header[kPairsAt + g.space.rank];
    start[other] = first;
    if (header[kRowBytesAt] != p.row_bytes) refuse_row(g, other, header[kRowBytesAt], p.row_bytes);
  }
  __syncthreads();
  if (other != 0) return;
  int received = 0, here = 0;
  for (int r = 0; r < ranks; ++r) {
    p.layout[r] = received;
    received += count[r];
    here += pairs[r];
  }
  p.layout[ranks] = received;
  start[ranks] = here;
  if (p.max_rows >= 0 && received > p.max_rows) refuse_rows(g, received, p.max_rows);
}

// One row by one warp, U at a time.
template <typename U>
__device__ __forceinline__ void copy_row(char* to, const char* from, int64_t row_bytes) {
  const int units = static_cast<int>(row_bytes / sizeof(U));
  for (int c = lane_id(); c < units; c += kWarp * kInFlight) {
    U held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (c + i * kWarp < units) held[i] = reinterpret_cast<const U*>(from)[c + i * kWarp];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (c + i * kWarp < units) reinterpret_cast<U*>(to)[c + i * kWarp] = held[i];
  }
}

// Where row r of the layout comes from: its rank, and its slot in that rank's own order.
struct Source {
  int rank;
  int64_t slot;
};
__device__ __forceinline__ Source source_of(const int32_t* layout, int ranks, int64_t row) {
  int rank = 0;
  while (row >= layout[rank + 1]) ++rank;
  return {rank, layout[ranks + 1 + rank] + row - layout[rank]};
}

template <typename U>
__global__ void __launch_bounds__(kThreads) pull_kernel(const PullParams p) {
  const SymmetricGroup& g = p.group;
  const auto& s = g.space;
  const unsigned epoch = epoch_of(g, true);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int received = p.layout[s.ranks], words = p.weight_bytes / 4;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; r < p.rows; r += warps) {
    char* to = static_cast<char*>(p.out) + r * p.row_bytes;
    int* weights = static_cast<int*>(p.weights) + r * s.top_k * words;  // null stays unread
    int32_t* ids = p.ids + r * s.top_k;
    if (r >= received) {
      for (int64_t c = lane_id(); c < p.row_bytes / static_cast<int64_t>(sizeof(U)); c += kWarp)
        reinterpret_cast<U*>(to)[c] = U{};
      if (p.ids) {
        for (int k = lane_id(); k < s.top_k; k += kWarp) ids[k] = -1;
        for (int k = lane_id(); k < s.top_k * words; k += kWarp) weights[k] = 0;
      }
      continue;
    }
    const Source source = source_of(p.layout, s.ranks, r);
    const char* from = half_of(g, source.rank, epoch);
    const int64_t token = reinterpret_cast<const int32_t*>(from + s.slots_at())[source.slot] / s.ranks_a_token();
    if (p.ids) {
      const auto* theirs = reinterpret_cast<const int32_t*>(from + s.ids_at()) + token * s.top_k;
      const auto* their_weights = reinterpret_cast<const int*>(from + s.weights_at()) + token * s.top_k * words;
      for (int k = lane_id(); k < s.top_k; k += kWarp) {
        const int id = theirs[k];
        ids[k] = id >= 0 && id / s.each == s.rank ? id % s.each : -1;
      }
      for (int k = lane_id(); k < s.top_k * words; k += kWarp) weights[k] = their_weights[k];
    }
    copy_row<U>(to, from + s.rows_at(p.weight_bytes) + token * p.row_bytes, p.row_bytes);
  }
}

template <typename U>
__global__ void __launch_bounds__(kThreads) push_kernel(const PushParams p) {
  const SymmetricGroup& g = p.group;
  const auto& s = g.space;
  const unsigned epoch = epoch_of(g, false);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const int received = p.layout[s.ranks], words = p.weight_bytes / 4;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; r < received; r += warps) {
    const Source home = source_of(p.layout, s.ranks, r);
    char* to = half_of(g, home.rank, epoch);
    copy_row<U>(to + home.slot * p.row_bytes, static_cast<const char*>(p.from) + r * p.row_bytes, p.row_bytes);
    if (p.weights) {
      auto* there = reinterpret_cast<int*>(to + s.pushed_weights_at(p.row_bytes)) + home.slot * s.top_k * words;
      for (int k = lane_id(); k < s.top_k * words; k += kWarp)
        there[k] = static_cast<const int*>(p.weights)[r * s.top_k * words + k];
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) sum_kernel(const SumParams p) {
  const SymmetricGroup& g = p.group;
  const auto& s = g.space;
  const char* half = half_of(g, s.rank, epoch_of(g, true));
  const T* rows = reinterpret_cast<const T*>(half);
  const auto* pushed = reinterpret_cast<const Acc<T>*>(half + s.pushed_weights_at(p.row_bytes));
  const int most = s.ranks_a_token();
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; t < p.tokens; t += warps) {
    const int32_t* slots = p.token_slot + t * most;
    T* out = static_cast<T*>(p.sums) + t * p.hidden;
    for (int64_t c = static_cast<int64_t>(lane_id()) * V; c < p.hidden; c += kWarp * V) {
      Acc<T> sum[V] = {};
#pragma unroll 4
      for (int j = 0; j < most; ++j) {
        const int64_t slot = slots[j];
        if (slot < 0) continue;
        const auto row = *reinterpret_cast<const Vec<T, V>*>(rows + slot * p.hidden + c);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += to_acc(row.v[v]);
      }
      Vec<T, V> packed;
#pragma unroll
      for (int v = 0; v < V; ++v) packed.v[v] = from_acc<T>(sum[v]);
      *reinterpret_cast<Vec<T, V>*>(out + c) = packed;
    }
    if (p.weights == nullptr) continue;
    for (int k = lane_id(); k < s.top_k; k += kWarp) {
      Acc<T> sum = 0;
      for (int j = 0; j < most; ++j)
        if (slots[j] >= 0) sum += pushed[slots[j] * static_cast<int64_t>(s.top_k) + k];
      static_cast<Acc<T>*>(p.weights)[t * s.top_k + k] = sum;
    }
  }
}

// Enough blocks to fill the device, and none without a row.
cudaError_t blocks_for(int64_t rows, int64_t* blocks) {
  int device, processors;
  if (const auto e = cudaGetDevice(&device)) return e;
  if (const auto e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  *blocks = std::min<int64_t>(ceil_div(rows, kWarps), static_cast<int64_t>(processors) * kBlocksAProcessor);
  return cudaSuccess;
}

bool wide_rows(int64_t row_bytes, const void* p) { return row_bytes % 16 == 0 && aligned_to(p, 16); }

}  // namespace

cudaError_t token_ranks(const TokenRanksParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  return launch(token_ranks_kernel, ceil_div(p.tokens, kThreads), kThreads, 0, stream, p);
}

cudaError_t stage(const StageParams& p, cudaStream_t stream) {
  const auto& s = p.group.space;
  const Segment x{p.x, s.rows_at(p.weight_bytes), p.tokens * p.row_bytes};
  const Segment offsets{p.offsets, 0, (s.ranks + 1) * 4}, pairs{p.pairs, kPairsAt * 4, s.ranks * 4};
  const Segment slots{p.slot_index, s.slots_at(), p.slots * 4};
  const Segment ids{p.ids, s.ids_at(), p.ids ? p.tokens * s.top_k * 4 : 0};
  const Segment weights{p.weights, s.weights_at(), p.weights ? p.tokens * s.top_k * p.weight_bytes : 0};
  int64_t blocks;
  if (const auto e = blocks_for(ceil_div(x.bytes, 16 * kWarp) + 1, &blocks)) return e;
  return launch(stage_kernel, blocks, kThreads, 0, stream, p.group, x, offsets, pairs, slots, ids, weights,
                static_cast<int>(p.row_bytes));
}

cudaError_t barrier(const BarrierParams& p, cudaStream_t stream) {
  return launch(barrier_kernel, 1, kMaxRanks, 0, stream, p);
}

cudaError_t pull(const PullParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  int64_t blocks;
  if (const auto e = blocks_for(p.rows, &blocks)) return e;
  return wide_rows(p.row_bytes, p.out) ? launch(pull_kernel<int4>, blocks, kThreads, 0, stream, p)
                                       : launch(pull_kernel<short>, blocks, kThreads, 0, stream, p);
}

cudaError_t push(const PushParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  int64_t blocks;
  if (const auto e = blocks_for(p.rows, &blocks)) return e;
  return wide_rows(p.row_bytes, p.from) ? launch(push_kernel<int4>, blocks, kThreads, 0, stream, p)
                                        : launch(push_kernel<short>, blocks, kThreads, 0, stream, p);
}

cudaError_t sum(const SumParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  int64_t blocks;
  if (const auto e = blocks_for(p.tokens, &blocks)) return e;
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return wide_rows(p.row_bytes, p.sums) ? launch(sum_kernel<T, kVector<T>>, blocks, kThreads, 0, stream, p)
                                          : launch(sum_kernel<T, 1>, blocks, kThreads, 0, stream, p);
  });
}

}  // namespace fastmoe_cpp::cuda
