// The grouped GEMM of the Hopper path: one persistent, warp-specialised kernel around a ring of shared-memory stages.
// One warp loads by TMA; two gather rows by cp.async, and one publishes them; two warpgroups multiply (wgmma) and write.
//   cooperative: both multiply one tile, 64 of its rows each;  ping-pong: each has its own tile, and one's epilogue
//   runs under the other's main loop.
#pragma once
#include "schedule.cuh"

namespace fastmoe_cpp::cuda::sm90 {

enum class Load {
  rows,           // K-major by TMA
  gathered_rows,  // K-major, one row of a token for each slot
  columns,        // MN-major by TMA
  gathered_columns,
};
__host__ __device__ constexpr bool is_gathered(Load load) { return load == Load::gathered_rows || load == Load::gathered_columns; }
__host__ __device__ constexpr bool is_mn_major(Load load) { return load == Load::columns || load == Load::gathered_columns; }

inline constexpr int kBlockK = 64;         // elements of the contraction a stage: one 128-byte swizzled row
inline constexpr int kBoxBytes = 8192;     // 64 x 64 elements
inline constexpr int kThreads = 384;       // two consumer warpgroups, then the producers' one
inline constexpr int kOrderBarrier = 1;    // named barriers 1 and 2: whose main loop is next
inline constexpr int kTransformBarrier = 3;

// kWeightGrad: the contraction runs over an expert's slots and the output is [E, m_size, n_size]; otherwise the tile's
// rows are slots. kHalves: halves of B's rows in a tile (a gate part, then an up part of the same columns).
template <typename T_, Load kA_, Load kB_, bool kCooperative_, int kBlocksM_, int kN_, int kHalves_, bool kWeightGrad_,
          class Epilogue_>
struct Gemm {
  using T = T_;
  using Epilogue = Epilogue_;
  static constexpr Load kA = kA_, kB = kB_;
  static constexpr bool kCooperative = kCooperative_, kWeightGrad = kWeightGrad_;
  static constexpr int kBlocksM = kBlocksM_;  // blocks of 64 rows a consumer warpgroup
  static constexpr int kM = 64 * kBlocksM * (kCooperative ? 2 : 1), kN = kN_, kHalves = kHalves_;
  static constexpr int kRowTile = kWeightGrad ? 0 : kM;
  static constexpr int kABytes = kM * 128, kBBytes = kN * 128, kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = 204800 / kStageBytes > 12 ? 12 : 204800 / kStageBytes;
  static constexpr bool kGathers = is_gathered(kA) || is_gathered(kB);
  // Wide gathers (B's 256 columns) need all four producer warps, and consumers fence. Otherwise warps 0 and 1 gather, and a
  // warp of its own publishes.
  static constexpr bool kPublishes = kGathers && !is_gathered(kB);
  static constexpr int kGatherThreads = kPublishes ? 64 : 128, kRowsACopy = kGatherThreads / 8;
  // 504 for a thread of each warpgroup.
  static constexpr int kProducerRegisters = !kGathers ? 40 : Epilogue::kInputHalves > 0 ? 104 : 88;
  static constexpr int kConsumerRegisters = (504 - kProducerRegisters) / 2;
  static constexpr int shared_bytes(int experts) {
    return 1024 + kStages * kStageBytes + 3 * kStages * 8 + Schedule::shared_bytes(experts);
  }
};

template <class G>
struct Arguments {
  CUtensorMap a_map, b_map;       // of operands that come by TMA
  CUtensorMap input_map;          // of the epilogue's input, where it has one: [halves][P][n_size]
  const void* gathered;           // [T, gathered_columns]
  const int32_t *slot_index, *expert_offsets;
  const float* slot_scale;        // weight gradients: routing weight [T, K] that scales A's slots, or null
  int64_t gathered_columns;
  int experts;
  uint32_t token_multiplier;      // pair / top_k = pair * multiplier >> 32 + shift; 0: top_k is 1
  int token_shift;
  int k_size, k_halves;           // contraction: k_halves parts of k_size (weight gradients: unused)
  int m_size, n_size;             // columns of the output (of a half of it); m_size: weight gradients alone
  int m_tiles, n_tiles;
  typename G::Epilogue::Params epilogue;

  __device__ __forceinline__ int token_of(int pair) const {
    return token_multiplier == 0 ? pair : static_cast<int>(__umulhi(pair, token_multiplier) >> token_shift);
  }
};

// Shared-memory addresses: the stages, and a barrier of each kind for every stage. `landed` counts gathering threads whose
// copies have been written.
struct Ring {
  uint32_t stages, full, empty, landed;
};

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
  return schedule.find<G::kRowTile>(index, args.experts, args.m_tiles, args.n_tiles);
}

// Stages of 64 columns that follow the tile's own with the epilogue's input.
template <class G>
__device__ __forceinline__ int input_blocks_of(const Arguments<G>& args, const Tile& tile) {
  if constexpr (G::Epilogue::kInputHalves == 0) return 0;
  return min(G::kN / 64, (args.n_size - tile.n * G::kN + 63) / 64);
}

// ---- producer ----

template <class G>
__device__ __forceinline__ void load_by_tma(const Arguments<G>& args, const Tile& tile, int k_block, uint32_t a, uint32_t b,
                                            uint32_t full) {
  // Contraction position: weight gradients count slots; others a column of one of the halves.
  int half = 0, k = k_block * kBlockK;
  if constexpr (!G::kWeightGrad) {
    const int blocks_a_half = (args.k_size + kBlockK - 1) / kBlockK;
    half = k_block >= blocks_a_half;
    k -= half * blocks_a_half * kBlockK;
  }
  const bool second_block = G::kM == 64 ? false : (G::kWeightGrad || tile.rows > 64);
  constexpr int kABox = is_gathered(G::kA) ? 0 : kBoxBytes;
  constexpr int kBBytes = is_gathered(G::kB) ? 0 : G::kBBytes;
  ptx::barrier_arrive_expect(full, kABox * (second_block ? 2 : 1) + kBBytes);
  if constexpr (G::kA == Load::rows) {
    ptx::tma_load(a, &args.a_map, full, k, tile.first, half, 0);
    if (second_block) ptx::tma_load(a + kBoxBytes, &args.a_map, full, k, tile.first + 64, half, 0);
  } else if constexpr (G::kA == Load::columns) {
    static_assert(G::kWeightGrad);
#pragma unroll
    for (int i = 0; i < G::kM / 64; ++i) {
      ptx::tma_load(a + i * kBoxBytes, &args.a_map, full, tile.m * G::kM + i * 64, tile.first + k, 0, 0);
    }
  }
  if constexpr (G::kB == Load::rows) {
    constexpr int kBoxRows = G::kN / G::kHalves;
#pragma unroll
    for (int i = 0; i < G::kHalves; ++i) {
      ptx::tma_load(b + i * kBoxRows * 128, &args.b_map, full, k, tile.n * kBoxRows, i, tile.expert);
    }
  } else if constexpr (G::kB == Load::columns) {
#pragma unroll
    for (int i = 0; i < G::kN / 64; ++i) {
      if constexpr (G::kWeightGrad) {
        ptx::tma_load(b + i * kBoxBytes, &args.b_map, full, tile.n * G::kN + i * 64, tile.first + k, 0, 0);
      } else {
        ptx::tma_load(b + i * kBoxBytes, &args.b_map, full, tile.n * G::kN + i * 64, k, half, tile.expert);
      }
    }
  }
}

template <class G>
__device__ __forceinline__ void load_input(const Arguments<G>& args, const Tile& tile, int block, uint32_t stage, uint32_t full) {
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

// In both gathers, thread -> one 16-byte chunk (thread % 8) of a 128-byte segment of rows thread / 8 + kRowsACopy i. Producers are
// bound by their own instructions: pointers are kept across stages, and full tiles take a path without predicates.

// Gathers rows of A. Rows past the tile reach only output rows that nobody stores; the contraction's tail is zeros.
template <class G>
struct RowGather {
  using T = typename G::T;
  static constexpr int kRows = G::kM / G::kRowsACopy;
  int pairs[kRows];         // of the tile to come, fetched while the present one runs
  uint32_t offsets[kRows];  // in units of 8 elements
  uint32_t rows_inside;
  const uint4* base;        // moves along the contraction

  __device__ __forceinline__ void fetch(const Arguments<G>& args, const Tile& tile) {
    const int row = (threadIdx.x & (G::kGatherThreads - 1)) >> 3;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      pairs[i] = row + G::kRowsACopy * i < tile.rows ? args.slot_index[tile.first + row + G::kRowsACopy * i] : -1;
    }
  }
  __device__ __forceinline__ void begin(const Arguments<G>& args) {
    base = static_cast<const uint4*>(args.gathered) + (threadIdx.x & 7);
    rows_inside = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      offsets[i] = static_cast<uint32_t>(args.token_of(max(pairs[i], 0))) * static_cast<uint32_t>(args.gathered_columns >> 3);
      rows_inside |= static_cast<uint32_t>(pairs[i] >= 0) << i;
    }
  }
  __device__ __forceinline__ void issue(const Arguments<G>& args, const Tile& tile, int k_block, uint32_t a, uint32_t) {
    const int row = (threadIdx.x & (G::kGatherThreads - 1)) >> 3, chunk = threadIdx.x & 7;
    const uint32_t destination = a + row * 128 + ((chunk ^ (row & 7)) << 4);
    if (tile.rows == G::kM && (k_block + 1) * kBlockK <= args.k_size) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) ptx::copy_async_16(destination + i * G::kRowsACopy * 128, base + offsets[i]);
    } else {
      const bool inside = k_block * kBlockK + chunk * 8 < args.k_size;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (rows_inside >> i & 1) {
          ptx::copy_async_16(destination + i * G::kRowsACopy * 128,
                             inside ? base + offsets[i] : static_cast<const uint4*>(args.gathered), inside);
        }
      }
    }
    base += kBlockK / 8;
  }
};

// Gathers the contraction's rows, MN-major: 64 slots, kColumns columns of their tokens. Slots past the expert's end are
// zeros.
template <class G>
struct ColumnGather {
  using T = typename G::T;
  static constexpr int kColumns = G::kA == Load::gathered_columns ? G::kM : G::kN;
  static constexpr int kRows = kBlockK / G::kRowsACopy;
  int pairs[kRows];  // of the k block to come

  __device__ __forceinline__ void fetch_block(const Arguments<G>& args, const Tile& tile, int k_block) {
    const int slot = k_block * kBlockK + ((threadIdx.x & (G::kGatherThreads - 1)) >> 3);
#pragma unroll
    for (int i = 0; i < kRows; ++i) pairs[i] = slot + G::kRowsACopy * i < tile.rows ? args.slot_index[tile.first + slot + G::kRowsACopy * i] : -1;
  }
  __device__ __forceinline__ void fetch(const Arguments<G>& args, const Tile& tile) { fetch_block(args, tile, 0); }
  __device__ __forceinline__ void begin(const Arguments<G>&) {}
  __device__ __forceinline__ void issue(const Arguments<G>& args, const Tile& tile, int k_block, uint32_t a, uint32_t b) {
    const int row = (threadIdx.x & (G::kGatherThreads - 1)) >> 3, chunk = threadIdx.x & 7;
    const int first_column = (G::kA == Load::gathered_columns ? tile.m : tile.n) * kColumns, column = first_column + chunk * 8;
    const uint32_t destination = (G::kA == Load::gathered_columns ? a : b) + row * 128 + ((chunk ^ (row & 7)) << 4);
    const T* sources[kRows];
    bool valid[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sources[i] = static_cast<const T*>(args.gathered) + column +
                   static_cast<int64_t>(args.token_of(max(pairs[i], 0))) * args.gathered_columns;
      valid[i] = pairs[i] >= 0;
    }
    fetch_block(args, tile, k_block + 1);
    if ((k_block + 1) * kBlockK <= tile.rows && first_column + kColumns <= args.gathered_columns) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int box = 0; box < kColumns / 64; ++box) {
          ptx::copy_async_16(destination + i * G::kRowsACopy * 128 + box * kBoxBytes, sources[i] + box * 64);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int box = 0; box < kColumns / 64; ++box) {
          const bool inside = valid[i] && column + box * 64 < args.gathered_columns;
          ptx::copy_async_16(destination + i * G::kRowsACopy * 128 + box * kBoxBytes,
                             inside ? sources[i] + box * 64 : static_cast<const T*>(args.gathered), inside);
        }
      }
    }
  }
};

// One warp: everything that comes by TMA.
template <class G>
__device__ __forceinline__ void load_tiles(const Arguments<G>& args, const Schedule& schedule, const Ring& ring) {
  Position<G::kStages> position;
  for (int index = blockIdx.x; index < schedule.total(args.experts); index += gridDim.x) {
    const Tile tile = find_tile(args, schedule, index);
    const int k_blocks = k_blocks_of(args, tile), blocks = k_blocks + input_blocks_of(args, tile);
    if ((threadIdx.x & 31) == 0) {
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

// Two or four warps: gathered rows; the four load what comes by TMA as well.
template <class G>
__device__ __forceinline__ void gather_tiles(const Arguments<G>& args, const Schedule& schedule, const Ring& ring) {
  std::conditional_t<is_mn_major(G::kA), ColumnGather<G>, RowGather<G>> gather;
  Position<G::kStages> position;
  int index = blockIdx.x;
  if (index >= schedule.total(args.experts)) return;
  Tile tile = find_tile(args, schedule, index);
  gather.fetch(args, tile);
  while (true) {
    const int k_blocks = k_blocks_of(args, tile), next_index = index + gridDim.x;
    const bool more = next_index < schedule.total(args.experts);
    gather.begin(args);
    const Tile next = more ? find_tile(args, schedule, next_index) : tile;
    if (G::kA == Load::gathered_rows && more) gather.fetch(args, next);
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
      const uint32_t a = ring.stages + position.stage * G::kStageBytes;
      ptx::barrier_wait(ring.empty + position.stage * 8, position.phase ^ 1);
      if constexpr (!G::kPublishes) {
        if ((threadIdx.x & 127) == 0) load_by_tma<G>(args, tile, k_block, a, a + G::kABytes, ring.full + position.stage * 8);
        __syncwarp();
      }
      gather.issue(args, tile, k_block, a, a + G::kABytes);
      ptx::copy_async_arrive((G::kPublishes ? ring.landed : ring.full) + position.stage * 8);
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
    index = next_index;
    if (G::kA != Load::gathered_rows) gather.fetch(args, tile);
  }
}

// One warp: hands gathered stages to the consumers. Gathered rows were written through the generic proxy and wgmma reads
// through the async proxy, so a proxy fence must stand between. It also waits for whatever its thread has in flight: on the
// gathering threads it would wait for later copies, on the consumers for wgmmas and stores. This warp has nothing in flight.
template <class G>
__device__ __forceinline__ void publish_tiles(const Arguments<G>& args, const Schedule& schedule, const Ring& ring) {
  Position<G::kStages> position;
  for (int index = blockIdx.x; index < schedule.total(args.experts); index += gridDim.x) {
    const Tile tile = find_tile(args, schedule, index);
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

// ---- consumers ----

// Weight gradients: makes A's or B's TMA-loaded slots past the expert's end zero, and scales A's slots where asked.
template <class G>
__device__ __forceinline__ void fix_slots(const Arguments<G>& args, const Tile& tile, int k_block, uint32_t a, uint32_t b,
                                          int group) {
  const int valid = tile.rows - k_block * kBlockK;
  const bool scaled = args.slot_scale != nullptr;
  if (valid >= kBlockK && !scaled) return;
  const int thread = threadIdx.x & 127;
  constexpr bool kFixA = G::kA == Load::columns;
  // A's blocks of this warpgroup are its own; B is shared, and both warpgroups write the same zeros.
  const uint32_t base = kFixA ? a + (G::kCooperative ? group * G::kBlocksM * kBoxBytes : 0) : b;
  constexpr int kBoxes = kFixA ? G::kBlocksM : G::kN / 64;
  for (int i = thread; i < 64 * 8 * kBoxes; i += 128) {
    const int row = (i >> 3) & 63;
    const uint32_t address = base + i * 16;
    if (row >= valid) {
      ptx::store_shared_16(address, {0, 0, 0, 0});
    } else if (scaled && kFixA) {
      using T = typename G::T;
      const float scale = args.slot_scale[args.slot_index[tile.first + k_block * kBlockK + row]];
      alignas(16) T values[8];
      uint32_t(&words)[4] = reinterpret_cast<uint32_t(&)[4]>(values);
      ptx::load_shared_16(words, address);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = T(static_cast<float>(values[j]) * scale);
      ptx::store_shared_16(address, words);
    }
  }
  ptx::proxy_fence();
  ptx::named_barrier_sync(kTransformBarrier + group, 128);
}

// The first kBlocks blocks of 64 rows; `hands_over`: the other warpgroup's main loop may start under this one's end.
template <class G, int kBlocks>
__device__ __forceinline__ void multiply(float (&accumulators)[G::kBlocksM][G::kN / 2], const Arguments<G>& args,
                                         const Tile& tile, int k_blocks, const Ring& ring, Position<G::kStages>& position,
                                         int group, bool hands_over) {
  constexpr int kTransposeA = is_mn_major(G::kA), kTransposeB = is_mn_major(G::kB);
  constexpr int kStepA = (kTransposeA ? 2048 : 32) >> 4, kStepB = (kTransposeB ? 2048 : 32) >> 4;
  const uint32_t a_offset = G::kCooperative ? group * G::kBlocksM * kBoxBytes : 0;
  const uint64_t a_base = ptx::matrix_descriptor(ring.stages + a_offset, kTransposeA ? kBoxBytes : 16);
  const uint64_t b_base = ptx::matrix_descriptor(ring.stages + G::kABytes, kTransposeB ? kBoxBytes : 16);
  const bool signals = (threadIdx.x & 31) == 0;
  int previous = 0;
  for (int k_block = 0; k_block < k_blocks; ++k_block) {
    const int stage = position.stage;
    ptx::barrier_wait(ring.full + stage * 8, position.phase);
    if constexpr (G::kGathers && !G::kPublishes) ptx::proxy_fence();
    if constexpr (G::kWeightGrad) {
      const uint32_t a = ring.stages + stage * G::kStageBytes;
      fix_slots<G>(args, tile, k_block, a, a + G::kABytes, group);
    }
    const uint64_t a = a_base + stage * (G::kStageBytes >> 4), b = b_base + stage * (G::kStageBytes >> 4);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) ptx::fence_registers(accumulators[m]);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        ptx::wgmma<typename G::T, G::kN, kTransposeA, kTransposeB>(accumulators[m], a + m * (kBoxBytes >> 4) + k * kStepA,
                                                                   b + k * kStepB, (k_block | k) != 0);
      }
    }
    ptx::wgmma_commit();
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) ptx::fence_registers(accumulators[m]);
    ptx::wgmma_wait<1>();
    if (k_block > 0 && signals) ptx::barrier_arrive(ring.empty + previous * 8);
    previous = stage;
    position.advance();
  }
  if (hands_over) ptx::named_barrier_arrive(kOrderBarrier + (group ^ 1), 256);
}

template <class G>
__device__ __forceinline__ void consume(const Arguments<G>& args, const Schedule& schedule, const Ring& ring, int group) {
  Position<G::kStages> position;
  float accumulators[G::kBlocksM][G::kN / 2];
  const bool signals = (threadIdx.x & 31) == 0;
  int turn = 0;
  for (int index = blockIdx.x; index < schedule.total(args.experts); index += gridDim.x, ++turn) {
    if (!G::kCooperative && (turn & 1) != group) {
      if constexpr (!G::kWeightGrad) {
        position.skip(k_blocks_of(args, Tile{}));
      } else {
        position.skip(k_blocks_of(args, find_tile(args, schedule, index)));
      }
      continue;
    }
    const Tile tile = find_tile(args, schedule, index);
    const int k_blocks = k_blocks_of(args, tile);
    const int first_row = G::kCooperative ? group * 64 * G::kBlocksM : 0;  // of this warpgroup in the tile
    // A warpgroup may wait for a stage only when every earlier phase of it has passed: parity tells just two apart.
    if (!G::kCooperative && turn > 0) ptx::named_barrier_sync(kOrderBarrier + group, 256);
    if (G::kWeightGrad && k_blocks == 0) {
#pragma unroll
      for (int m = 0; m < G::kBlocksM; ++m) {
#pragma unroll
        for (int i = 0; i < G::kN / 2; ++i) accumulators[m][i] = 0;
      }
    }
    const int rows_here = G::kWeightGrad ? G::kM : __shfl_sync(0xFFFFFFFF, tile.rows - first_row, 0);
    if (rows_here <= 0) {
      const int blocks = k_blocks + input_blocks_of(args, tile);
      for (int block = 0; block < blocks; ++block) {
        ptx::barrier_wait(ring.full + position.stage * 8, position.phase);
        if (signals) ptx::barrier_arrive(ring.empty + position.stage * 8);
        position.advance();
      }
      continue;
    }
    const bool hands_over = !G::kCooperative && index + gridDim.x < schedule.total(args.experts);
    if (G::kBlocksM == 2 && rows_here <= 64) {
      multiply<G, 1>(accumulators, args, tile, k_blocks, ring, position, group, hands_over);
    } else {
      multiply<G, G::kBlocksM>(accumulators, args, tile, k_blocks, ring, position, group, hands_over);
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < G::kBlocksM; ++m) ptx::fence_registers(accumulators[m]);
    if (k_blocks > 0 && signals) {
      ptx::barrier_arrive(ring.empty + (position.stage == 0 ? G::kStages - 1 : position.stage - 1) * 8);
    }
    G::Epilogue::template store<G>(args, tile, first_row, accumulators, ring, position);
  }
}

template <class G>
__global__ void __launch_bounds__(kThreads, 1) grouped_gemm(const __grid_constant__ Arguments<G> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared_memory[];
  uint8_t* const stages = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared_memory) + 1023) & ~uintptr_t{1023});
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(stages + G::kStages * G::kStageBytes);
  Ring ring;
  ring.stages = ptx::shared_address(stages);
  ring.full = ptx::shared_address(barriers);
  ring.empty = ring.full + G::kStages * 8;
  ring.landed = ring.empty + G::kStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < G::kStages; ++i) {
      ptx::barrier_init(ring.full + i * 8, G::kPublishes ? 2 : G::kGathers ? 1 + G::kGatherThreads : 1);
      ptx::barrier_init(ring.landed + i * 8, G::kGatherThreads);
      ptx::barrier_init(ring.empty + i * 8, G::kCooperative ? 8 : 4);
    }
    ptx::barrier_init_fence();
    if (!is_gathered(G::kA)) ptx::tma_prefetch_descriptor(&args.a_map);
    if (!is_gathered(G::kB)) ptx::tma_prefetch_descriptor(&args.b_map);
  }
  ptx::wait_for_previous_kernel();
  const Schedule schedule = Schedule::build<G::kRowTile, kThreads>(reinterpret_cast<int*>(barriers + 3 * G::kStages),
                                                                   args.expert_offsets, args.experts, args.m_tiles, args.n_tiles);
  ptx::launch_next_kernel();
  const int group = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x >> 7), 0);
  if (group < 2) {
    ptx::increase_registers<G::kConsumerRegisters>();
    consume<G>(args, schedule, ring, group);
  } else {
    ptx::decrease_registers<G::kProducerRegisters>();
    const int warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x >> 5), 0) & 3;
    if constexpr (G::kGathers && !G::kPublishes) {
      gather_tiles<G>(args, schedule, ring);
    } else {
      if (warp == 2) load_tiles<G>(args, schedule, ring);
    }
    if constexpr (G::kPublishes) {
      if (warp < 2) gather_tiles<G>(args, schedule, ring);
      if (warp == 3) publish_tiles<G>(args, schedule, ring);
    }
  }
#endif
}

}  // namespace fastmoe_cpp::cuda::sm90
