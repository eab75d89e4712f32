// Which tile of the output a block computes next. The number of rows of every expert is known on the device alone, so
// each block lays out all tiles from expert_offsets and takes every gridDim.x-th.
#pragma once
#include "ptx.cuh"

namespace fastmoe_cpp::cuda::sm90 {

struct Tile {
  int expert;
  int first;  // its first slot
  int rows;   // slots of the tile (weight gradients: all slots of the expert, the contraction)
  int m, n;   // position in units of tiles
};

// Tiles of an expert run down M first within groups of kGroupRows rows, so that blocks that run together share
// both their rows and their weights in L2.
inline constexpr int kGroupRows = 2048;

struct Schedule {
  const int* offsets;  // [E + 1] in shared memory, and behind it the number of tiles before each expert, [E + 1]

  __device__ int total(int experts) const { return offsets[2 * experts + 1]; }

  static __host__ __device__ constexpr int shared_bytes(int experts) { return (2 * (experts + 1) + 16) * 4; }

  // Called by every thread of the block; ends with a block barrier. kRowTile 0: weight gradients, with m_tiles x
  // n_tiles tiles an expert; otherwise tiles of kRowTile slots by n_tiles.
  template <int kRowTile, int kThreads>
  __device__ static Schedule build(int* shared, const int32_t* expert_offsets, int experts, int m_tiles, int n_tiles) {
    constexpr int kPerThread = (1024 + kThreads - 1) / kThreads;
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
        count[i] =
            kRowTile == 0 ? m_tiles * n_tiles : (end - begin + kRowTile - 1) / (kRowTile == 0 ? 1 : kRowTile) * n_tiles;
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
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int expert = thread * kPerThread + i;
      if (expert < experts) before[expert] = running;
      running += count[i];
      if (expert == experts - 1) before[experts] = running;
    }
    __syncthreads();
    return {offsets};
  }

  // Called by whole warps; 0 <= index < total().
  template <int kRowTile>
  __device__ Tile find(int index, int experts, int m_tiles, int n_tiles) const {
    const int* const tiles_before = offsets + experts + 1;
    const int lane = threadIdx.x & 31;
    Tile tile;
    int m_tiles_here = m_tiles, local;
    if constexpr (kRowTile == 0) {
      tile.expert = index / (m_tiles * n_tiles);
      local = index - tile.expert * m_tiles * n_tiles;
      tile.first = offsets[tile.expert];
      tile.rows = offsets[tile.expert + 1] - tile.first;
    } else {
      // The last expert whose first tile is not past `index`, in two steps of 32.
      const int chunk = (experts + 31) / 32;
      int probe = lane * chunk;
      const int upper =
          __popc(__ballot_sync(0xFFFFFFFF, probe < experts && tiles_before[min(probe, experts)] <= index)) - 1;
      probe = upper * chunk + lane;
      const bool before = lane < chunk && probe < experts && tiles_before[min(probe, experts)] <= index;
      tile.expert = upper * chunk + __popc(__ballot_sync(0xFFFFFFFF, before)) - 1;
      local = index - tiles_before[tile.expert];
      tile.first = offsets[tile.expert];
      tile.rows = offsets[tile.expert + 1] - tile.first;
      m_tiles_here = (tile.rows + kRowTile - 1) / kRowTile;
    }
    constexpr int kGroup = kGroupRows / (kRowTile == 0 ? 128 : kRowTile);
    const int group = local / (kGroup * n_tiles);
    local -= group * kGroup * n_tiles;
    const int tall = min(kGroup, m_tiles_here - group * kGroup);
    tile.n = local / tall;
    tile.m = group * kGroup + local - tile.n * tall;
    if constexpr (kRowTile != 0) {
      tile.first += tile.m * kRowTile;
      tile.rows = min(kRowTile, tile.rows - tile.m * kRowTile);
    }
    return tile;
  }
};

}  // namespace fastmoe_cpp::cuda::sm90
