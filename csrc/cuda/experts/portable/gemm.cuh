// The grouped product: a persistent CTA walks over its tiles while copies into shared memory run `stages` blocks of the
// contraction ahead, across the border from one tile to the next.
#pragma once
#include "arguments.h"
#include "config.h"
#include "epilogue.cuh"
#include "mma.cuh"
#include "schedule.cuh"

namespace fastmoe_cpp::cuda::portable {

// One 16-byte chunk of which the first `valid` elements exist; the others become zeros.
template <bool kVectorised, class T>
__device__ __forceinline__ void copy_chunk(SharedAddress to, const T* from, int valid) {
  if constexpr (kVectorised) {
    copy_async<16>(to, from, valid > 0);
  } else {
    alignas(16) T v[16 / sizeof(T)];
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) v[i] = i < valid ? from[i] : T(0.f);
    store_shared(to, *reinterpret_cast<const uint4*>(v));
  }
}

// Copies blocks [kTile rows][128 bytes] of an operand by rows.
template <class T, bool kVectorised, int kTile, int kThreads>
struct RowCopier {
  static constexpr int kStep = kThreads / 8, kCount = kTile / kStep, kChunk = 16 / sizeof(T);
  static_assert(kTile % kStep == 0);
  static __device__ int row(int i) { return threadIdx.x / 8 + i * kStep; }

  // source(i) is the row that row(i) of the tile comes from, or -1; shared_row where it goes.
  template <class Source, class SharedRow>
  static __device__ void copy(SharedAddress to, const T* from, int stride, int k, int contraction, Source&& source,
                              SharedRow&& shared_row) {
    const int chunk = threadIdx.x % 8, in = k + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = source(i);
      copy_chunk<kVectorised>(to + chunk_offset(shared_row(row(i)), chunk, 128),
                              from + static_cast<int64_t>(max(r, 0)) * stride + (in < contraction ? in : 0),
                              r >= 0 ? contraction - in : 0);
    }
  }
};

// Copies blocks [kRows of the contraction][kTile] of an operand by contraction.
template <class T, bool kVectorised, int kTile, int kRows, int kThreads>
struct ColumnCopier {
  static constexpr int kChunk = 16 / sizeof(T), kWide = kTile / kChunk;  // chunks in a row
  static constexpr int kStep = kThreads / kWide, kCount = kRows / kStep;
  static_assert(kThreads % kWide == 0 && kRows % kStep == 0);
  static __device__ int row(int i) { return threadIdx.x / kWide + i * kStep; }

  // Rows of one warp: kPerPass at a time, kHeld of them in a block, of which a lane keeps one.
  static constexpr int kPerPass = kWide < kWarp ? kWarp / kWide : 1, kHeld = kPerPass * kCount;
  static_assert(kHeld <= kWarp);
  static __device__ int held_row() {
    const int lane = lane_id() % kHeld;
    return threadIdx.x / kWarp * kWarp / kWide + lane / kPerPass * kStep + lane % kPerPass;
  }
  static __device__ int held_by(int i) { return i * kPerPass + lane_id() / kWide % kPerPass; }

  template <class Source>
  static __device__ void copy(SharedAddress to, const T* from, int stride, int column, int columns, Source&& source) {
    const int chunk = threadIdx.x % kWide, at = column + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = source(i);
      copy_chunk<kVectorised>(to + chunk_offset(row(i), chunk, kTile * sizeof(T)),
                              from + static_cast<int64_t>(max(r, 0)) * stride + (at < columns ? at : 0),
                              r >= 0 ? columns - at : 0);
    }
  }
};

// kScaled: weight_grad with a routing weight for every slot.
template <Kind kKind_, class T_, bool kVectorised_, int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_, int kCtas_,
          bool kScaled_ = false>
struct Traits {
  using T = T_;
  static constexpr Kind kKind = kKind_;
  static constexpr bool kVectorised = kVectorised_, kScaled = kScaled_;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpsN = kWarpsN_, kCtas = kCtas_;
  static constexpr int kThreads = kWarpsM_ * kWarpsN_ * kWarp;
  static constexpr int kWarpM = kTileM / kWarpsM_, kWarpN = kTileN / kWarpsN_;
  static constexpr bool kWeightGrad = kKind == Kind::weight_grad;
  static constexpr bool kAByRows = !kWeightGrad, kBByRows = kKind == Kind::up || kKind == Kind::linear;
  static constexpr bool kHalf = sizeof(T) == 2;
  using Mma = std::conditional_t<kHalf, HalfMma<T, kWarpM, kWarpN, kTileM, kTileN, kAByRows, kBByRows>,
                                 SimtMma<T, kWarpM, kTileM, kTileN, kAByRows, kBByRows>>;
  static_assert(Mma::kWarpN == kWarpN);
  static constexpr int kBlockK = Mma::kBlockK;
  using ScheduleOf = Schedule<!kWeightGrad, kTileM, kThreads>;
};

// The copying side of the pipeline: a position in the stream of blocks, and the rows it copies from.
template <class Traits>
class Loader {
  using T = typename Traits::T;
  using A = Acc<T>;
  static constexpr int kBlockK = Traits::kBlockK, kThreads = Traits::kThreads;
  static constexpr int kABytes = Traits::kTileM * 128;
  static constexpr bool kWeightGrad = Traits::kWeightGrad, kVectorised = Traits::kVectorised;
  using RowsA = RowCopier<T, kVectorised, kWeightGrad ? kThreads / 8 : Traits::kTileM, kThreads>;
  using RowsB = RowCopier<T, kVectorised, Traits::kTileN, kThreads>;
  using ColumnsA = ColumnCopier<T, kVectorised, kWeightGrad ? Traits::kTileM : kThreads * 16 / int(sizeof(T)) / kBlockK,
                                kBlockK, kThreads>;
  using ColumnsB = ColumnCopier<T, kVectorised, Traits::kTileN, kBlockK, kThreads>;

 public:
  __device__ Loader(const Arguments& args, const typename Traits::ScheduleOf& schedule)
      : args_(args), schedule_(schedule) {}

  // Moves on to the next block. Where a tile begins, or a block of gathered rows, this reads the plan: call it well
  // ahead of copy_a and copy_b.
  __device__ void advance() {
    ++block_;
    while (live_ && block_ >= blocks_) {
      live_ = schedule_.tile(next_++, tile_);
      blocks_ = kWeightGrad ? (tile_.slots + kBlockK - 1) / kBlockK : (args_.contraction + kBlockK - 1) / kBlockK;
      block_ = 0;
      if constexpr (!kWeightGrad) {
        if (live_) {
#pragma unroll
          for (int i = 0; i < RowsA::kCount; ++i)
            row_a_[i] = source(RowsA::row(i), tile_.rows, tile_.row, args_.gather_a);
        }
      }
    }
    if constexpr (kWeightGrad) {
      if (!live_) return;
      const int first = block_ * kBlockK;
      held_a_ = source(first + ColumnsA::held_row(), tile_.slots, tile_.first, args_.gather_a);
      held_b_ = source(first + ColumnsB::held_row(), tile_.slots, tile_.first, args_.gather_b);
    }
  }

  __device__ void copy_a(SharedAddress stage) {
    if (!live_) return;
    const T* a = static_cast<const T*>(args_.a);
    if constexpr (kWeightGrad) {
      ColumnsA::copy(stage, a, args_.a_stride, tile_.row, args_.rows,
                     [&](int i) { return __shfl_sync(kAllLanes, held_a_, ColumnsA::held_by(i)); });
    } else {
      RowsA::copy(
          stage, a, args_.a_stride, block_ * kBlockK, args_.contraction, [&](int i) { return row_a_[i]; },
          [](int r) { return r; });
    }
  }

  __device__ void copy_b(SharedAddress stage) {
    if (!live_) return;
    const T* b = static_cast<const T*>(args_.b) + tile_.expert * args_.b_expert;
    if constexpr (kWeightGrad) {
      ColumnsB::copy(stage + kABytes, b, args_.b_stride, tile_.column, args_.columns,
                     [&](int i) { return __shfl_sync(kAllLanes, held_b_, ColumnsB::held_by(i)); });
    } else if constexpr (Traits::kBByRows) {
      RowsB::copy(
          stage + kABytes, b, args_.b_stride, block_ * kBlockK, args_.contraction,
          [&](int i) { return column_source(RowsB::row(i)); }, [](int c) { return Traits::Mma::shared_row(c); });
    } else {
      const int k = block_ * kBlockK;
      ColumnsB::copy(stage + kABytes, b, args_.b_stride, tile_.column, args_.columns, [&](int i) {
        const int r = k + ColumnsB::row(i);
        return r < args_.contraction ? weight_row(r, args_.alternate) : -1;
      });
    }
  }

  // The routing weights of the block's slots; zeros past the last.
  __device__ void copy_scale(SharedAddress to) {
    if (!live_ || threadIdx.x >= kBlockK) return;
    const int slot = block_ * kBlockK + threadIdx.x;
    const bool valid = slot < tile_.slots;
    const int pair = valid ? args_.slot_index[tile_.first + slot] : 0;
    copy_async<sizeof(A)>(to + threadIdx.x * static_cast<int>(sizeof(A)), static_cast<const A*>(args_.weights) + pair,
                          valid);
  }

 private:
  __device__ int source(int i, int valid, int first, bool gather) const {
    if (i >= valid) return -1;
    return gather ? args_.top_k(args_.slot_index[first + i]) : first + i;
  }

  // The weight's row behind column c of the tile. Gated, the groups of columns hold gate and up rows by turns.
  __device__ int column_source(int c) const {
    constexpr int kGroup = Traits::kWarpN / 2;
    const bool gated = Traits::kKind == Kind::up && args_.gated;
    const int group = c / kGroup, half = gated ? group % 2 : 0;
    const int column = tile_.column + (gated ? group / 2 : group) * kGroup + c % kGroup;
    if (column >= args_.columns) return -1;
    if (Traits::kKind != Kind::up) return column;
    return args_.alternate ? 2 * column + half : column + half * args_.columns;
  }

  const Arguments& args_;
  const typename Traits::ScheduleOf& schedule_;
  Tile tile_{};
  int next_ = 0, block_ = -1, blocks_ = 0;
  bool live_ = true;
  int row_a_[RowsA::kCount];
  int held_a_ = -1, held_b_ = -1;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    grouped_gemm(const __grid_constant__ Arguments args, int stages) {
  using Mma = typename Traits::Mma;
  using A = Acc<typename Traits::T>;
  constexpr int kABytes = Traits::kTileM * 128, kStageBytes = kABytes + Traits::kTileN * 128;
  constexpr bool kWeightGrad = Traits::kWeightGrad, kScaled = Traits::kScaled;
  constexpr int kScaleBytes = kWeightGrad ? 256 : 0;  // a scale for each element of the contraction
  static_assert(kScaleBytes == 0 || kScaleBytes >= Traits::kBlockK * int(sizeof(A)));
  extern __shared__ __align__(1024) unsigned char shared[];

  unsigned char* scales = shared + stages * kStageBytes;
  const int tile_columns = Traits::kKind == Kind::up && args.gated ? Traits::kTileN / 2 : Traits::kTileN;
  const typename Traits::ScheduleOf schedule(args.expert_offsets, args.experts, args.rows, args.columns, tile_columns,
                                             reinterpret_cast<int*>(scales + stages * kScaleBytes));
  const int warp = threadIdx.x / kWarp, warp_m = warp / Traits::kWarpsN, warp_n = warp % Traits::kWarpsN;
  const SharedAddress base = shared_address(shared), scale_base = shared_address(scales);

  Loader<Traits> loader(args, schedule);
  for (int s = 0; s < stages - 1; ++s) {
    loader.advance();
    loader.copy_a(base + s * kStageBytes);
    loader.copy_b(base + s * kStageBytes);
    if constexpr (kScaled) loader.copy_scale(scale_base + s * kScaleBytes);
    copy_async_commit();
  }
  // All but the newest stages - 2 groups have landed, for every thread.
  const auto wait = [&] {
    if (stages >= 5)
      copy_async_wait<3>();
    else if (stages == 4)
      copy_async_wait<2>();
    else if (stages == 3)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    __syncthreads();  // by all warps, though not all from the same place
  };
  wait();

  Mma mma(warp_m, warp_n);
  const auto load = [&](typename Mma::Fragment& f, int stage, int step) {
    mma.load(f, base + stage * kStageBytes, base + stage * kStageBytes + kABytes, step);
    if constexpr (kScaled) mma.scale(f, reinterpret_cast<const A*>(scales + stage * kScaleBytes), step);
  };
  static_assert(!Mma::kPipelined || Mma::kSteps % 2 == 0);
  typename Mma::Fragment fragment[Mma::kPipelined ? 2 : 1];
  int reading = 0, writing = stages - 1;
  if constexpr (Mma::kPipelined) load(fragment[0], 0, 0);

  // A tile's blocks; a warp all of whose rows lie past the end of the tile only copies.
  const auto walk = [&](int blocks, auto active) {
    constexpr bool kActive = decltype(active)::value;
    for (int block = 0; block < blocks; ++block) {
      const SharedAddress to = base + writing * kStageBytes;
      const int next = reading + 1 == stages ? 0 : reading + 1;
#pragma unroll
      for (int step = 0; step < Mma::kSteps; ++step) {
        if constexpr (!Mma::kPipelined) {
          if (kActive) load(fragment[0], reading, step);
          if (kActive) mma.multiply(fragment[0]);
        } else {
          if (step == Mma::kSteps - 1) {
            // All of this block is in registers: it may be overwritten once every warp has come here.
            wait();
            load(fragment[step % 2 ^ 1], next, 0);
          } else if (kActive) {
            load(fragment[step % 2 ^ 1], reading, step + 1);
          }
          if (kActive) mma.multiply(fragment[step % 2]);
        }
        if (step == 0) loader.advance();
        if (step == 1) loader.copy_a(to);
        if (step == 2) {
          loader.copy_b(to);
          if constexpr (kScaled) loader.copy_scale(scale_base + writing * kScaleBytes);
          copy_async_commit();
        }
      }
      if constexpr (!Mma::kPipelined) {
        if (kActive) mma.fold();
        wait();
      }
      reading = next;
      writing = writing + 1 == stages ? 0 : writing + 1;
    }
  };

  Tile tile;
  for (int i = 0; schedule.tile(i, tile); ++i) {
    const int blocks = ((kWeightGrad ? tile.slots : args.contraction) + Traits::kBlockK - 1) / Traits::kBlockK;
    const bool active = warp_m * Traits::kWarpM < tile.rows;
    if constexpr (Traits::kKind == Kind::act_grad) prefetch_pre_activation<Traits>(args, tile);
    mma.clear();
    if (active)
      walk(blocks, std::true_type{});
    else
      walk(blocks, std::false_type{});
    epilogue<Traits>(args, tile, mma, warp_n, active);
  }
}

}  // namespace fastmoe_cpp::cuda::portable
