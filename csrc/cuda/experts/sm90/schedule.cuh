// Which tile of the output a block computes next. The number of rows of every expert is known on the device alone, so
// each block lays out all tiles from expert_offsets and, one of n, takes every n-th. The weight gradients' tiles are as long
// as their expert has slots: where those are uneven the experts go by falling number of slots, and a cluster that has done
// one tile claims the next from a counter, so that they all end together. (Even, claims cost more than they save: 1.5% of
// the six products.)
#pragma once
#include "ptx.cuh"

namespace fastmoe_cpp::cuda::sm90 {

struct Tile {
  int expert;
  int first;    // its first slot
  int rows;     // slots of the tile (weight gradients: all slots of the expert, the contraction)
  int m, n;     // position in units of tiles; may lie outside the matrix for the second block of a cluster
  int first_n;  // n of the cluster's first block
  bool shared;  // the blocks of the cluster share B
};

// Tiles of an expert run down M first within groups of kGroupRows rows, so that blocks that run together share
// both their rows and their weights in L2.
inline constexpr int kGroupRows = 2048;

struct Schedule {
  // Shared memory: expert_offsets [E + 1]; then the number of indices before each expert (where uneven: the experts in
  // their order), and behind it the number of all.
  uint32_t offsets;
  bool uneven;  // weight gradients: an expert has a quarter more slots than the mean

  __device__ int total(int experts) const { return ptx::load_shared(offsets + 4 * (2 * experts + 1)); }

  static __host__ __device__ constexpr int shared_bytes(int experts) { return (2 * (experts + 1) + 16) * 4; }

  // How many indices m_tiles x n_tiles tiles take. A cluster takes pairs along M, and pairs along N of the row that is
  // left over.
  template <class G>
  __device__ static int indices(int m_tiles, int n_tiles) {
    if constexpr (G::kCluster == 1) return m_tiles * n_tiles;
    return m_tiles / 2 * n_tiles + (m_tiles & 1) * ((n_tiles + 1) / 2);
  }

  // Called by every thread of the block; ends with a block barrier. G::kRowTile 0: weight gradients, with m_tiles x
  // n_tiles tiles an expert; otherwise tiles of kRowTile slots by n_tiles.
  template <class G, int kThreads>
  __device__ static Schedule build(int* shared, const int32_t* expert_offsets, int experts, int m_tiles, int n_tiles) {
    constexpr int kPerThread = (1024 + kThreads - 1) / kThreads, kRowTile = G::kRowTile;
    int *const offsets = shared, *const before = shared + experts + 1, *const warp_sums = before + experts + 1;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    int count[kPerThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int expert = thread * kPerThread + i;
      count[i] = 0;
      if (expert < experts) {
        const int begin = expert_offsets[expert], end = expert_offsets[expert + 1];
        offsets[expert] = begin;
        if (expert == experts - 1) offsets[experts] = end;
        const int m_tiles_here =
            kRowTile == 0 ? m_tiles : (end - begin + kRowTile - 1) / (kRowTile == 0 ? 1 : kRowTile);
        count[i] = indices<G>(m_tiles_here, n_tiles);
      }
      sum += count[i];
    }
    int inclusive = sum;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFF, inclusive, delta);
      if (lane >= delta) inclusive += other;
    }
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    int running = inclusive - sum;
    for (int w = 0; w < warp; ++w) running += warp_sums[w];
    bool uneven = false;
    if constexpr (kRowTile == 0) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int expert = thread * kPerThread + i;
        if (expert < experts) {
          const int64_t slots = offsets[expert + 1] - offsets[expert];
          uneven |= 4 * slots * experts > 5ll * offsets[experts];
        }
      }
      uneven = __syncthreads_or(uneven);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int expert = thread * kPerThread + i;
        if (uneven && expert < experts) {
          const int slots = offsets[expert + 1] - offsets[expert];
          int place = 0;
          for (int other = 0; other < experts; ++other) {
            const int theirs = offsets[other + 1] - offsets[other];
            place += theirs > slots || (theirs == slots && other < expert);
          }
          before[place] = expert;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int expert = thread * kPerThread + i;
      if (kRowTile != 0 && expert < experts) before[expert] = running;
      running += count[i];
      if (expert == experts - 1) before[experts] = running;
    }
    __syncthreads();
    return {ptx::shared_address(offsets), uneven};
  }

  // Called by whole warps; 0 <= index < total().
  template <class G>
  __device__ Tile find(int index, int experts, int m_tiles, int n_tiles) const {
    constexpr int kRowTile = G::kRowTile;
    const auto first_slot = [&](int expert) { return ptx::load_shared(offsets + 4 * expert); };
    const auto before = [&](int expert) { return ptx::load_shared(offsets + 4 * (experts + 1 + expert)); };
    const int lane = threadIdx.x & 31;
    Tile tile;
    int m_tiles_here = m_tiles, local;
    if constexpr (kRowTile == 0) {
      const int each = indices<G>(m_tiles, n_tiles);
      const int place = index / each;
      tile.expert = uneven ? before(place) : place;
      local = index - place * each;
      tile.first = first_slot(tile.expert);
      tile.rows = first_slot(tile.expert + 1) - tile.first;
    } else {
      // The last expert whose first tile is not past `index`, in two steps of 32.
      const int chunk = (experts + 31) / 32;
      int probe = lane * chunk;
      const int upper = __popc(__ballot_sync(0xFFFFFFFF, probe < experts && before(min(probe, experts)) <= index)) - 1;
      probe = upper * chunk + lane;
      const bool begun = lane < chunk && probe < experts && before(min(probe, experts)) <= index;
      tile.expert = upper * chunk + __popc(__ballot_sync(0xFFFFFFFF, begun)) - 1;
      local = index - before(tile.expert);
      tile.first = first_slot(tile.expert);
      tile.rows = first_slot(tile.expert + 1) - tile.first;
      m_tiles_here = (tile.rows + kRowTile - 1) / kRowTile;
    }
    constexpr int kGroup = kGroupRows / (kRowTile == 0 ? 128 : kRowTile) / G::kCluster;
    const int rows = m_tiles_here / G::kCluster;  // of what a cluster takes
    const int rank = G::kCluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
    tile.shared = G::kCluster > 1 && local < rows * n_tiles;
    if (G::kCluster > 1 && !tile.shared) {
      tile.m = m_tiles_here - 1;
      tile.first_n = 2 * (local - rows * n_tiles);
      tile.n = tile.first_n + rank;
    } else {
      const int group = local / (kGroup * n_tiles);
      local -= group * kGroup * n_tiles;
      const int tall = min(kGroup, rows - group * kGroup), column = local / tall;
      tile.m = (group * kGroup + local - column * tall) * G::kCluster + rank;
      tile.n = tile.first_n = column;
    }
    if constexpr (kRowTile != 0) {
      tile.first += tile.m * kRowTile;
      tile.rows = min(kRowTile, tile.rows - tile.m * kRowTile);
    }
    return tile;
  }
};

}  // namespace fastmoe_cpp::cuda::sm90
