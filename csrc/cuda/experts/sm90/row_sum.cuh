// The sum of slots' rows into tokens by some blocks of a product's kernel, beside its tiles: the product is bound by the
// tensor cores, the sum by memory. The arithmetic and its order are combine.cu's, and so are the bits.
#pragma once
#include "../../device.cuh"
#include "ptx.cuh"

namespace fastmoe_cpp::cuda::sm90 {

inline constexpr int kThreads = 384;  // of a block of the grouped GEMM

// out[t] = sum over k, in order, of weights[t, k] * rows[token_slot[t, k]]; a slot of -1 is skipped and never read.
struct RowSum {
  const void* rows;           // [P, hidden], rows on 16 bytes
  void* out;                  // [tokens, hidden], the same
  const int32_t* token_slot;  // [tokens, top_k]
  const float* weights;       // [tokens, top_k], or null: all ones
  uint32_t tokens, hidden, top_k;
  int blocks;  // that do it, whole clusters: the last of the grid; 0: no sum

  static constexpr int kSteps = 4, kRows = 8;  // in flight, and rows of each
  static constexpr int kSharedBytes = kSteps * kRows * kThreads * 16;
};
struct NoSum {
  static constexpr int blocks = 0;
};

// A warp takes kTokens neighbouring tokens a step, kExperts rows of each, 16 bytes a lane. So few multiprocessors get
// their bandwidth from many bytes in flight: rows come through shared memory, each lane's through places of its own, and
// slots are looked up a step before their rows are asked for.
template <typename T, int kTokens, int kExperts>
struct RowSummer {
  static constexpr int kRows = RowSum::kRows, kWidth = kVector<T>, kChunk = kWarp * kWidth, kWarps = kThreads / kWarp;
  static constexpr int kSteps = RowSum::kSteps;
  static_assert(kTokens * kExperts == kRows && kRows <= kWarp);
  struct Place {
    uint32_t token, column;
    uint32_t k;  // with kTokens > 1 always 0: top_k <= kExperts
  };

  const RowSum& p;
  const uint32_t columns, token_step, column_step;  // columns: in whole chunks
  const uint32_t lane, shared;
  const uint64_t policy;
  Place asked, added;     // the next to be asked for, and to be added
  int32_t slot;           // lane i: of row i of `asked`
  float weight;           // the same, and
  float weights[kSteps];  // of the steps in flight
  float sum[kWidth] = {};

  __device__ __forceinline__ RowSummer(const RowSum& p, uint32_t block, uint32_t shared)
      : p(p),
        columns((p.hidden + kChunk - 1) / kChunk * kChunk),
        token_step(p.blocks * kWarps / (columns / kChunk) * kTokens),
        column_step(p.blocks * kWarps % (columns / kChunk) * kChunk),
        lane(lane_id()),
        shared(shared + threadIdx.x * 16),
        policy(ptx::evict_first()) {
    const uint32_t warp = block * kWarps + __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
    asked = added = {warp / (columns / kChunk) * kTokens, warp % (columns / kChunk) * kChunk, 0};
    look_up();
  }

  __device__ __forceinline__ void advance(Place& place) const {
    if (kTokens == 1 && (place.k += kExperts) < p.top_k) return;
    place.k = 0;
    place.token += token_step, place.column += column_step;
    if (place.column >= columns) place.column -= columns, place.token += kTokens;
  }

  __device__ __forceinline__ void look_up() {
    const uint32_t token = asked.token + lane / kExperts, k = asked.k + lane % kExperts, pair = token * p.top_k + k;
    const bool there = lane < kRows && token < p.tokens && k < p.top_k;
    slot = there ? __ldg(p.token_slot + pair) : -1;
    weight = there && p.weights != nullptr ? __ldg(p.weights + pair) : 1.0f;
  }

  // Rows that are not there arrive as zeros.
  __device__ __forceinline__ void ask(uint32_t to) {
#pragma unroll
    for (int i = 1; i < kSteps; ++i) weights[i - 1] = weights[i];
    weights[kSteps - 1] = slot >= 0 ? weight : 0.0f;  // a dropped pair's may be NaN
    const uint32_t column = asked.column + lane * kWidth, row_bytes = p.hidden * sizeof(T);
    const bool inside = column < p.hidden;
    const char* const rows = static_cast<const char*>(p.rows) + (inside ? column * sizeof(T) : 0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t from = __shfl_sync(kAllLanes, slot, i);
      ptx::copy_async_once_16(to + i * kThreads * 16, rows + uint64_t{static_cast<uint32_t>(max(from, 0))} * row_bytes,
                              from >= 0 && inside, policy);
    }
    ptx::copy_async_commit();
    advance(asked);
    look_up();
  }

  __device__ __forceinline__ void add(uint32_t from) {
    const uint32_t column = added.column + lane * kWidth;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int k = 0; k < kExperts; ++k) {
        const int i = t * kExperts + k;
        const float scale = __shfl_sync(kAllLanes, weights[0], i);
        uint32_t row[kWidth / 2];
        ptx::load_shared_16(row, from + i * kThreads * 16);
#pragma unroll
        for (int v = 0; v < kWidth; v += 2) {
          const float2 two = unpack<T>(row[v / 2]);
          sum[v] = fmaf(scale, two.x, sum[v]);
          sum[v + 1] = fmaf(scale, two.y, sum[v + 1]);
        }
      }
      if (kTokens == 1 && added.k + kExperts < p.top_k) break;
      alignas(16) T packed[kWidth];
#pragma unroll
      for (int v = 0; v < kWidth; ++v) packed[v] = from_acc<T>(sum[v]), sum[v] = 0.0f;
      const uint32_t token = added.token + t;
      if (token < p.tokens && column < p.hidden) {
        __stcs(reinterpret_cast<int4*>(static_cast<T*>(p.out) + uint64_t{token} * p.hidden + column),
               reinterpret_cast<const int4&>(packed));
      }
    }
    advance(added);
  }

  __device__ __forceinline__ void run() {
    constexpr uint32_t kStepBytes = RowSum::kSharedBytes / kSteps;
    const uint32_t last = shared + (kSteps - 1) * kStepBytes;
#pragma unroll 1
    for (uint32_t at = shared + kStepBytes; at <= last; at += kStepBytes) ask(at);
    // An address of the thread, not an offset for all: with one in a uniform register ptxas 13.0 made copies of it that the
    // hardware refused.
    for (uint32_t at = shared; added.token < p.tokens;) {
      ask(at);
      at = at == last ? shared : at + kStepBytes;
      ptx::copy_async_wait<kSteps - 1>();
      add(at);
    }
    ptx::copy_async_wait<0>();
  }
};

// Block `block` of p.blocks, with RowSum::kSharedBytes of shared memory. A step has as many of a token's rows, and with
// them of the zeros that fill it up, as one of combine.cu.
template <typename T>
__device__ __forceinline__ void sum_slots(const RowSum& p, uint32_t block, uint32_t shared) {
  if (p.top_k == 1) return RowSummer<T, 8, 1>(p, block, shared).run();
  if (p.top_k == 2) return RowSummer<T, 4, 2>(p, block, shared).run();
  if (p.top_k <= 4) return RowSummer<T, 2, 4>(p, block, shared).run();
  return RowSummer<T, 1, 8>(p, block, shared).run();
}

}  // namespace fastmoe_cpp::cuda::sm90
