// The order in which tiles are computed, worked out by every CTA from expert_offsets alone.
#pragma once
#include "../../device.cuh"

namespace fastmoe_cpp::cuda::portable {

struct Tile {
  int expert;
  int row, rows;     // first row, and how many: slots, or output rows of a weight gradient
  int column;        // first column
  int first, slots;  // the expert's slots
};

// kOverSlots: tiles cover slots x columns, so their number is known on the device only. Otherwise they cover
// rows x columns of every expert, and experts come longest contraction first.
// Within an expert, kGroup row tiles share each column tile while it is in L2. The CTAs take tiles in turn, and the turn
// is reversed on every other round, so that unequal tiles even out.
template <bool kOverSlots, int kTileRows, int kThreads>
class Schedule {
 public:
  static constexpr int kGroup = 8;

  // shared: 2 * (experts + 1) ints
  __device__ Schedule(const int32_t* expert_offsets, int experts, int rows, int columns, int tile_columns, int* shared)
      : offsets_(shared), order_(shared + experts + 1), experts_(experts), rows_(rows), tile_columns_(tile_columns) {
    column_tiles_ = (columns + tile_columns - 1) / tile_columns;
    for (int e = threadIdx.x; e <= experts; e += kThreads) offsets_[e] = expert_offsets[e];
    __syncthreads();
    if constexpr (kOverSlots) {
      count_tiles();
    } else {
      sort_by_length();
      tiles_ = experts * row_tiles(rows) * column_tiles_;
    }
    __syncthreads();
    if constexpr (kOverSlots) tiles_ = order_[experts];
  }

  // The i-th tile of this CTA; false past the last.
  __device__ bool tile(int i, Tile& tile) const {
    const int grid = gridDim.x, cta = blockIdx.x;
    const int t = i * grid + (i & 1 ? grid - 1 - cta : cta);
    if (t >= tiles_) return false;
    int within, tiles_down;
    if constexpr (kOverSlots) {
      tile.expert = expert_of(t);
      within = t - order_[tile.expert];
    } else {
      const int an_expert = row_tiles(rows_) * column_tiles_;
      tile.expert = order_[t / an_expert];
      within = t % an_expert;
    }
    tile.first = offsets_[tile.expert];
    tile.slots = offsets_[tile.expert + 1] - tile.first;
    tiles_down = row_tiles(kOverSlots ? tile.slots : rows_);

    const int a_group = kGroup * column_tiles_;
    const int above = within / a_group * kGroup, in_group = within % a_group;
    const int height = min(kGroup, tiles_down - above);
    const int down = (above + in_group % height) * kTileRows;
    tile.column = in_group / height * tile_columns_;
    tile.row = kOverSlots ? tile.first + down : down;
    tile.rows = min(kTileRows, (kOverSlots ? tile.slots : rows_) - down);
    return true;
  }

 private:
  static __device__ int row_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows; }

  // order_[e]: the number of tiles before expert e.
  __device__ void count_tiles() {
    if (threadIdx.x >= kWarp) return;
    const int lane = threadIdx.x, each = (experts_ + kWarp - 1) / kWarp;
    const int begin = min(lane * each, experts_), end = min(begin + each, experts_);
    int sum = 0;
    for (int e = begin; e < end; ++e) sum += row_tiles(offsets_[e + 1] - offsets_[e]) * column_tiles_;
    int before = sum;
#pragma unroll
    for (int d = 1; d < kWarp; d *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, d);
      if (lane >= d) before += other;
    }
    if (lane == kWarp - 1) order_[experts_] = before;
    before -= sum;
    for (int e = begin; e < end; ++e) {
      order_[e] = before;
      before += row_tiles(offsets_[e + 1] - offsets_[e]) * column_tiles_;
    }
  }

  // order_[i]: the expert with the i-th most slots.
  __device__ void sort_by_length() {
    for (int e = threadIdx.x; e < experts_; e += kThreads) {
      const int mine = offsets_[e + 1] - offsets_[e];
      int rank = 0;
      for (int o = 0; o < experts_; ++o) {
        const int other = offsets_[o + 1] - offsets_[o];
        rank += other > mine || (other == mine && o < e);
      }
      order_[rank] = e;
    }
  }

  __device__ int expert_of(int t) const {
    int expert = 0;
    for (int e = lane_id(); e - lane_id() < experts_; e += kWarp) {
      const unsigned done = __ballot_sync(kAllLanes, e < experts_ && order_[e + 1] <= t);
      expert += __popc(done);
      if (done != kAllLanes) break;
    }
    return expert;
  }

  int* offsets_;  // [experts + 1]
  int* order_;    // [experts + 1]
  int experts_, rows_, tile_columns_, column_tiles_, tiles_;
};

}  // namespace fastmoe_cpp::cuda::portable
