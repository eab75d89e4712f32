// The producers: what fills the stages.
#pragma once
#include "traits.cuh"

namespace fastmoe_cpp::cuda::sm90 {

template <class G>
__device__ __forceinline__ void load_by_tma(const Arguments<G>& args, const Tile& tile, int k_block, uint32_t a,
                                            uint32_t b, uint32_t full) {
  // Contraction position: weight gradients count slots; others a column of one of the halves.
  int half = 0, k = k_block * kBlockK;
  if constexpr (!G::kWeightGrad) {
    const int blocks_a_half = (args.k_size + kBlockK - 1) / kBlockK;
    half = k_block >= blocks_a_half;
    k -= half * blocks_a_half * kBlockK;
  }
  const bool second_block = G::kM == 64 ? false : (G::kWeightGrad || tile.rows > 64);
  constexpr int kABox = is_gathered(G::kA) ? 0 : kBoxBytes;
  ptx::barrier_arrive_expect(full, kABox * (second_block ? 2 : 1) + G::kBBytes);
  // Where the cluster shares B, its box i is loaded by block i % 2, for both.
  const int rank = G::kCluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  const auto load = [&](int i, uint32_t to, int column, int row, int part, int expert) {
    if (G::kCluster == 1 || !tile.shared) {
      ptx::tma_load(to, &args.b_map, full, column, row, part, expert);
    } else if ((i & 1) == rank) {
      ptx::tma_load_to_all(to, &args.b_map, full, column, row, part, expert, (1 << G::kCluster) - 1);
    }
  };
  if constexpr (G::kA == Load::rows) {
    ptx::tma_load(a, &args.a_map, full, k, tile.first, half, 0);
    if (second_block) ptx::tma_load(a + kBoxBytes, &args.a_map, full, k, tile.first + 64, half, 0);
  }
  if constexpr (G::kB == Load::rows) {
    constexpr int kRows = G::kBBoxRows, kBoxesAHalf = G::kN / G::kHalves / kRows;
#pragma unroll
    for (int i = 0; i < G::kN / kRows; ++i) {
      load(i, b + i * kRows * 128, k, (tile.n * kBoxesAHalf + i % kBoxesAHalf) * kRows, i / kBoxesAHalf, tile.expert);
    }
  } else {
#pragma unroll
    for (int i = 0; i < G::kN / 64; ++i) {
      if constexpr (G::kWeightGrad) {
        load(i, b + i * kBoxBytes, tile.n * G::kN + i * 64, tile.first + k, 0, 0);
      } else {
        load(i, b + i * kBoxBytes, tile.n * G::kN + i * 64, k, half, tile.expert);
      }
    }
  }
}

template <class G>
__device__ __forceinline__ void load_input(const Arguments<G>& args, const Tile& tile, int block, uint32_t stage,
                                           uint32_t full) {
  constexpr int kHalves = G::Epilogue::kInputHalves;
  static_assert(kHalves * G::kM * 128 <= G::kStageBytes);
  const int boxes = G::kM > 64 && tile.rows > 64 ? 2 : 1;
  ptx::barrier_arrive_expect(full, kHalves * boxes * kBoxBytes);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    for (int i = 0; i < boxes; ++i) {
      ptx::tma_load(stage + half * G::kM * 128 + i * kBoxBytes, &args.input_map, full, tile.n * G::kN + block * 64,
                    tile.first + i * 64, half, 0);
    }
  }
}

// In both gathers, thread -> one 16-byte chunk (thread % 8) of a 128-byte segment of rows thread / 8 + kRowsACopy i.
// Producers are bound by their own instructions: pointers are kept across stages, and full tiles take a path without
// predicates.

// Between waiting for a stage and its last copy stand the copies alone: what comes before is prepared, what comes after
// advanced.

// Gathers rows of A. Rows past the tile reach only output rows that nobody stores; the contraction's tail is zeros.
template <class G>
struct RowGather {
  using T = typename G::T;
  static constexpr int kRows = G::kM / G::kRowsACopy;
  static constexpr int kLoads = kRows / 8;
  static_assert(G::kRowsACopy == 8);
  // Of the tile to come, fetched while the present one runs: a warp's rows are 8 i + r + 4 warp, r < 4, of which lane l
  // looks up those with 4 i + r = l and l + 32, for all lanes.
  int pairs[kLoads];
  uint32_t offsets[kRows];  // in units of 8 elements
  const uint4* base;        // moves along the contraction

  __device__ __forceinline__ void fetch(const Arguments<G>& args, const Tile& tile) {
    const int lane = threadIdx.x & 31, row = (lane >> 2) * 8 + (lane & 3) + ((threadIdx.x >> 5) & 1) * 4;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      pairs[i] = row + 64 * i < tile.rows ? args.slot_index[tile.first + row + 64 * i] : 0;
  }
  __device__ __forceinline__ void begin(const Arguments<G>& args, const Tile&) {
    base = static_cast<const uint4*>(args.gathered) + (threadIdx.x & 7);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t offset =
          static_cast<uint32_t>(args.token_of(pairs[i])) * static_cast<uint32_t>(args.gathered_columns >> 3);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        offsets[8 * i + j] = __shfl_sync(0xFFFFFFFF, offset, 4 * j + ((threadIdx.x >> 3) & 3));
    }
  }
  __device__ __forceinline__ void prepare(const Arguments<G>&, const Tile&, int) {}
  __device__ __forceinline__ void issue(const Arguments<G>& args, const Tile& tile, int k_block, uint32_t a) {
    const int row = (threadIdx.x & (G::kGatherThreads - 1)) >> 3, chunk = threadIdx.x & 7;
    const uint32_t destination = a + row * 128 + ((chunk ^ (row & 7)) << 4);
    if (tile.rows == G::kM && (k_block + 1) * kBlockK <= args.k_size) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) ptx::copy_async_16(destination + i * G::kRowsACopy * 128, base + offsets[i]);
    } else {
      const bool inside = k_block * kBlockK + chunk * 8 < args.k_size;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row + G::kRowsACopy * i < tile.rows) {
          ptx::copy_async_16(destination + i * G::kRowsACopy * 128,
                             inside ? base + offsets[i] : static_cast<const uint4*>(args.gathered), inside);
        }
      }
    }
  }
  __device__ __forceinline__ void advance() { base += kBlockK / 8; }
};

// Gathers the contraction's rows, MN-major: 64 slots, kM columns of their tokens. Slots past the expert's end are zeros.
template <class G>
struct ColumnGather {
  static constexpr int kRows = kBlockK / G::kRowsACopy, kBoxes = G::kM / 64;
  static_assert(kRows == 4);
  // A warp's slots of a block are 16 i + 4 warp + r, i and r < 4; lane l looks up that with 4 i + r = l % 16, of the first
  // of two blocks for l < 16 and of the second for the others.
  int ahead;                 // pair in the first two blocks of the tile to come
  int pair;                  // in the two blocks after those at hand
  uint32_t offset;           // of its row in those at hand, in units of 8 elements
  const uint4* base;         // a row's first element of this thread, but for the row
  bool whole;                // all columns are there
  const uint4* rows[kRows];  // of the block to come

  __device__ __forceinline__ int look_up(const Arguments<G>& args, const Tile& tile, int k_block) const {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const int slot = (k_block + (lane >> 4)) * kBlockK + ((lane >> 2) & 3) * 16 + warp * 4 + (lane & 3);
    return slot < tile.rows ? args.slot_index[tile.first + slot] : 0;
  }
  __device__ __forceinline__ void fetch(const Arguments<G>& args, const Tile& tile) { ahead = look_up(args, tile, 0); }
  __device__ __forceinline__ void begin(const Arguments<G>& args, const Tile& tile) {
    pair = ahead;
    base = static_cast<const uint4*>(args.gathered) + tile.m * (G::kM / 8) + (threadIdx.x & 7);
    asm("" : "+l"(base));  // opaque, or the compiler adds up its parts for every row
    whole = (tile.m + 1) * G::kM <= args.gathered_columns;
  }
  // Before the wait for the stage: finding its rows takes as long as its copies.
  __device__ __forceinline__ void prepare(const Arguments<G>& args, const Tile& tile, int k_block) {
    if (k_block % 2 == 0) {
      offset = static_cast<uint32_t>(args.token_of(pair)) * static_cast<uint32_t>(args.gathered_columns >> 3);
      pair = look_up(args, tile, k_block + 2);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      rows[i] = base + __shfl_sync(0xFFFFFFFF, offset, k_block % 2 * 16 + 4 * i + ((threadIdx.x >> 3) & 3));
  }
  __device__ __forceinline__ void issue(const Arguments<G>& args, const Tile& tile, int k_block, uint32_t a) {
    const int row = (threadIdx.x & (G::kGatherThreads - 1)) >> 3, chunk = threadIdx.x & 7;
    const uint32_t destination = a + row * 128 + ((chunk ^ (row & 7)) << 4);
    if (whole && (k_block + 1) * kBlockK <= tile.rows) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box)
          ptx::copy_async_16(destination + i * G::kRowsACopy * 128 + box * kBoxBytes, rows[i] + box * 8);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
          const bool inside = k_block * kBlockK + row + G::kRowsACopy * i < tile.rows &&
                              tile.m * G::kM + box * 64 + chunk * 8 < args.gathered_columns;
          ptx::copy_async_16(destination + i * G::kRowsACopy * 128 + box * kBoxBytes,
                             inside ? rows[i] + box * 8 : static_cast<const uint4*>(args.gathered), inside);
        }
      }
    }
  }
  __device__ __forceinline__ void advance() {}
};

// One warp: everything that comes by TMA.
template <class G>
__device__ __forceinline__ void load_tiles(const Arguments<G>& args, const Schedule& schedule, const Ring& ring) {
  Position<G::kStages> position;
  for (Walk<G> walk; walk.index < schedule.total(args.experts); walk.next(args, schedule, ring)) {
    const Tile tile = find_tile(args, schedule, walk.index);
    const int k_blocks = k_blocks_of(args, tile), blocks = k_blocks + input_blocks_of(args, tile);
    if (ptx::elect()) {
      for (int block = 0; block < blocks; ++block) {
        const uint32_t stage = ring.stages + position.stage * G::kStageBytes, full = ring.full + position.stage * 8;
        ptx::barrier_wait(ring.empty + position.stage * 8, position.phase ^ 1);
        if (G::Epilogue::kInputHalves == 0 || block < k_blocks) {
          load_by_tma<G>(args, tile, block, stage, stage + G::kABytes, full);
        } else {
          if constexpr (G::Epilogue::kInputHalves > 0) load_input<G>(args, tile, block - k_blocks, stage, full);
        }
        position.advance();
      }
    }
    __syncwarp();
  }
}

// Two or four warps: gathered rows; the four load what comes by TMA as well, by turns.
template <class G>
__device__ __forceinline__ void gather_tiles(const Arguments<G>& args, const Schedule& schedule, const Ring& ring) {
  std::conditional_t<is_mn_major(G::kA), ColumnGather<G>, RowGather<G>> gather;
  Position<G::kStages> position;
  Walk<G> walk;
  if (walk.index >= schedule.total(args.experts)) return;
  Tile tile = find_tile(args, schedule, walk.index);
  gather.fetch(args, tile);
  while (true) {
    const int k_blocks = k_blocks_of(args, tile);
    gather.begin(args, tile);
    Tile next;
    bool more;
    int answer = 0;
    const bool claims = G::kClaims && schedule.uneven, expects = claims && (threadIdx.x & 127) == 0;
    const bool asks = expects && (G::kCluster == 1 || ptx::cluster_rank() == 0);
    const auto look_ahead = [&] {
      if (asks) walk.tell(ring, answer);
      __syncwarp();
      walk.next(args, schedule, ring);
      more = walk.index < schedule.total(args.experts);
      if (more) {
        next = find_tile(args, schedule, walk.index);
        gather.fetch(args, next);
      }
    };
    constexpr int kAnswered = 2;  // the block of the contraction by which a claim has come back
    if (expects) walk.expect(ring);
    if (asks) answer = walk.ask(args);
    const int looks = claims ? min(kAnswered, k_blocks) : 0;
    for (int k_block = 0;; ++k_block) {
      if (k_block == looks) look_ahead();
      if (k_block == k_blocks) break;
      const uint32_t a = ring.stages + position.stage * G::kStageBytes;
      gather.prepare(args, tile, k_block);
      ptx::barrier_wait(ring.empty + position.stage * 8, position.phase ^ 1);
      if constexpr (!G::kPublishes) {
        if (ptx::elect() && (threadIdx.x >> 5 & 3) == k_block % 4)
          load_by_tma<G>(args, tile, k_block, a, a + G::kABytes, ring.full + position.stage * 8);
        __syncwarp();
      }
      gather.issue(args, tile, k_block, a);
      ptx::copy_async_arrive((G::kPublishes ? ring.landed : ring.full) + position.stage * 8);
      gather.advance();
      position.advance();
    }
    const int input_blocks = input_blocks_of(args, tile);
    for (int block = 0; block < input_blocks; ++block) {
      ptx::barrier_wait(ring.empty + position.stage * 8, position.phase ^ 1);
      ptx::barrier_arrive(ring.landed + position.stage * 8);
      position.advance();
    }
    if (!more) return;
    tile = next;
  }
}

// One warp: hands gathered stages to the consumers. Gathered rows were written through the generic proxy and wgmma
// reads through the async proxy, so a proxy fence must stand between. It also waits for whatever its thread has in
// flight: on the gathering threads it would wait for later copies, on the consumers for wgmmas and stores. This warp
// has nothing in flight.
template <class G>
__device__ __forceinline__ void publish_tiles(const Arguments<G>& args, const Schedule& schedule, const Ring& ring) {
  Position<G::kStages> position;
  for (Walk<G> walk; walk.index < schedule.total(args.experts); walk.next(args, schedule, ring)) {
    const Tile tile = find_tile(args, schedule, walk.index);
    const int blocks = k_blocks_of(args, tile) + input_blocks_of(args, tile);
    if ((threadIdx.x & 31) == 0) {
      for (int block = 0; block < blocks; ++block) {
        ptx::barrier_wait(ring.landed + position.stage * 8, position.phase);
        ptx::proxy_fence();
        ptx::barrier_arrive(ring.full + position.stage * 8);
        position.advance();
      }
    }
    __syncwarp();
  }
}

}  // namespace fastmoe_cpp::cuda::sm90
