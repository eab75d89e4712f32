// What describes one instantiation of the grouped GEMM, its arguments, and its ring of shared-memory stages.
#pragma once
#include "row_sum.cuh"
#include "schedule.cuh"

namespace fastmoe_cpp::cuda::sm90 {

enum class Load {
  rows,           // K-major by TMA
  gathered_rows,  // K-major, one row of a token for each slot
  columns,        // MN-major by TMA
  gathered_columns,
};
__host__ __device__ constexpr bool is_gathered(Load load) {
  return load == Load::gathered_rows || load == Load::gathered_columns;
}
__host__ __device__ constexpr bool is_mn_major(Load load) {
  return load == Load::columns || load == Load::gathered_columns;
}

inline constexpr int kBlockK = 64;       // elements of the contraction a stage: one 128-byte swizzled row
inline constexpr int kBoxBytes = 8192;   // 64 x 64 elements
inline constexpr int kOrderBarrier = 1;  // named barriers 1 and 2: whose main loop is next
inline constexpr int kTransformBarrier = 3;

// kWeightGrad: the contraction runs over an expert's slots and the product is [E, H, n_size]; otherwise the tile's
// rows are slots. kHalves: halves of B's rows in a tile (a gate part, then an up part of the same columns).
// kCluster 2: two blocks take tiles above each other, which share B: each loads half of it and sends it to both
// (multicast).
// kCarriesSum: some of the blocks may do a RowSum instead of tiles.
template <typename T_, Load kA_, Load kB_, bool kCooperative_, int kN_, int kHalves_, bool kWeightGrad_, int kCluster_,
          class Epilogue_, bool kCarriesSum_ = false>
struct Gemm {
  using T = T_;
  using Epilogue = Epilogue_;
  static constexpr Load kA = kA_, kB = kB_;
  static constexpr bool kCooperative = kCooperative_, kWeightGrad = kWeightGrad_;
  static constexpr int kM = kCooperative ? 128 : 64, kN = kN_, kHalves = kHalves_;
  static constexpr int kRowTile = kWeightGrad ? 0 : kM;
  static constexpr bool kCarriesSum = kCarriesSum_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kBBoxRows = kN / (kHalves > kCluster ? kHalves : kCluster);  // of B that comes as Load::rows
  static_assert(kCluster == 1 || kCluster == 2);
  static_assert(!is_gathered(kB) && (kA == Load::gathered_columns) == kWeightGrad &&
                (kB == Load::columns || !kWeightGrad));
  static constexpr int kABytes = kM * 128, kBBytes = kN * 128, kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = 204800 / kStageBytes > 12 ? 12 : 204800 / kStageBytes;
  static constexpr bool kGathers = is_gathered(kA);
  // Weight gradients look up slots in every stage and need all four producer warps: consumers fence. Otherwise warps 0 and
  // 1 gather, and a warp of its own publishes.
  static constexpr bool kPublishes = kGathers && !kWeightGrad;
  static_assert(!kGathers || kPublishes || Epilogue::kInputHalves == 0);
  static constexpr int kGatherThreads = kPublishes ? 64 : 128, kRowsACopy = kGatherThreads / 8;
  // By turns, one's stores are under the other's main loop anyway.
  static constexpr bool kHolds = Epilogue::kHolds && kCooperative;
  // 504 for a thread of each warpgroup.
  static constexpr int kProducerRegisters = !kGathers ? 40 : kWeightGrad ? 56 : 88;
  static constexpr int kConsumerRegisters = (504 - kProducerRegisters) / 2;
  static constexpr bool kClaims = kWeightGrad;                       // tiles come from a counter
  static constexpr int kBarriers = 3 * kStages + (kClaims ? 5 : 0);  // of 8 bytes, and two claims in the last of them
  static constexpr int kStagingBytes = kWeightGrad ? 8192 : 0;       // of each warpgroup's epilogue
  static constexpr int shared_bytes(int experts) {
    return 1024 + kStages * kStageBytes + 2 * kStagingBytes + kBarriers * 8 + Schedule::shared_bytes(experts);
  }
};

template <class G>
struct Arguments {
  CUtensorMap a_map, b_map;  // of operands that come by TMA
  CUtensorMap input_map;     // of the epilogue's input, where it has one: [halves][P][n_size]
  const void* gathered;      // [T, gathered_columns]
  const int32_t *slot_index, *expert_offsets;
  const float* slot_scale;  // weight gradients: routing weight [T, K] that scales A's slots, or null
  int* claimed;             // weight gradients: how many tiles have been claimed from the counter, at first 0
  int64_t gathered_columns;
  int experts;
  uint32_t token_multiplier;  // pair / top_k = pair * multiplier >> 32 + shift; 0: top_k is 1
  int token_shift;
  int k_size, k_halves;  // contraction: k_halves parts of k_size (weight gradients: unused)
  int n_size;            // columns of the product (of a half of it)
  int m_tiles, n_tiles;
  typename G::Epilogue::Params epilogue;
  std::conditional_t<G::kCarriesSum, RowSum, NoSum> sum;

  __device__ __forceinline__ int token_of(int pair) const {
    return token_multiplier == 0 ? pair : static_cast<int>(__umulhi(pair, token_multiplier) >> token_shift);
  }
};

// A thread's accumulators, rounded, two in a word.
template <class G>
using Packed = uint32_t[G::kN / 4];

// Shared-memory addresses: the stages, what epilogues pass through, and a barrier of each kind for every stage. `landed` counts gathering threads
// whose copies have been written; `empty` counts consumer warps of every block of the cluster, since each may be sent
// the next stage by any.
struct Ring {
  uint32_t stages, staging, full, empty, landed;
};

// Behind them, where tiles are claimed: for each of two claims a barrier that it is there, one that all warps of the
// cluster have read it (in the cluster's first block), and the claim.
template <class G>
struct Claim {
  uint32_t full, empty, value;
  __device__ __forceinline__ Claim(const Ring& ring, int i)
      : full(ring.landed + G::kStages * 8 + 8 * i), empty(full + 16), value(full + 32 - 4 * i) {}
};

// A consumer warp has read the stage for the last time.
template <class G>
__device__ __forceinline__ void release(const Ring& ring, int stage) {
  const uint32_t lane = threadIdx.x & 31, barrier = ring.empty + stage * 8;
  if constexpr (G::kCluster == 1) {
    if (lane == 0) ptx::barrier_arrive(barrier);
  } else {
    if (lane < G::kCluster) ptx::barrier_arrive_in(barrier, lane);
  }
}

template <int kStages>
struct Position {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ void skip(int count) {
    const int next = stage + count;
    stage = next % kStages;
    phase ^= (next / kStages) & 1;
  }
};

template <class G>
__device__ __forceinline__ int k_blocks_of(const Arguments<G>& args, const Tile& tile) {
  if constexpr (G::kWeightGrad) return (tile.rows + kBlockK - 1) / kBlockK;
  return args.k_halves * ((args.k_size + kBlockK - 1) / kBlockK);
}

template <class G>
__device__ __forceinline__ Tile find_tile(const Arguments<G>& args, const Schedule& schedule, int index) {
  // Opaque, or the compiler keeps what it derives from the sizes in registers through the loop over the contraction.
  int m_tiles = args.m_tiles, n_tiles = args.n_tiles, experts = args.experts;
  asm volatile("" : "+r"(m_tiles), "+r"(n_tiles), "+r"(experts));
  return schedule.find<G>(index, experts, m_tiles, n_tiles);
}

// The tiles of this cluster, one after another: every step()'th, or the first so and then what it claims. Every warp
// walks them all.
template <class G>
struct Walk {
  int index = blockIdx.x / G::kCluster;
  int turn = 0;

  // The clusters that take tiles.
  static __device__ __forceinline__ int step(const Arguments<G>& args) {
    return (gridDim.x - args.sum.blocks) / G::kCluster;
  }

  // By whole warps.
  __device__ __forceinline__ void next(const Arguments<G>& args, const Schedule& schedule, const Ring& ring) {
    if (G::kClaims && schedule.uneven) {
      const Claim<G> claim(ring, turn & 1);
      ptx::barrier_wait(claim.full, turn >> 1 & 1);
      index = ptx::load_shared(claim.value);
      __syncwarp();
      if ((threadIdx.x & 31) == 0) ptx::barrier_arrive_in(claim.empty, 0);
    } else {
      index += step(args);
    }
    ++turn;
  }

  // For the tile after the present one, a thread of each block expects a claim; that of the first block asks the counter
  // for it early, and tells the cluster late.
  __device__ __forceinline__ void expect(const Ring& ring) const {
    ptx::barrier_arrive_expect(Claim<G>(ring, turn & 1).full, 4);
  }
  __device__ __forceinline__ int ask(const Arguments<G>& args) const { return step(args) + atomicAdd(args.claimed, 1); }
  __device__ __forceinline__ void tell(const Ring& ring, int answer) const {
    const Claim<G> claim(ring, turn & 1);
    ptx::barrier_wait(claim.empty, (turn >> 1 & 1) ^ 1);
    for (int rank = 0; rank < G::kCluster; ++rank) ptx::send_word(claim.value, answer, claim.full, rank);
  }
};

// Stages of 64 columns that follow the tile's own with the epilogue's input: the same number in all blocks of a cluster.
template <class G>
__device__ __forceinline__ int input_blocks_of(const Arguments<G>& args, const Tile& tile) {
  if constexpr (G::Epilogue::kInputHalves == 0) return 0;
  return min(G::kN / 64, (args.n_size - tile.first_n * G::kN + 63) / 64);
}

}  // namespace fastmoe_cpp::cuda::sm90
