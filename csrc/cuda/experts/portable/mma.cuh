// Warp-level products out of swizzled shared memory, accumulated in registers: HalfMma on tensor cores, SimtMma for
// float32 and float64 on the ordinary units.
//
// An operand lies in shared memory in one of two ways, in 16-byte chunks:
//   by rows         [tile][128 bytes of the contraction]    as the weights of `up` and all gathered rows do
//   by contraction  [kBlockK][tile]                         as the weights of act_grad and both factors of weight_grad do
// A warp's columns are two groups of kWarpN / 2. In each, a thread ends with kVector neighbouring columns (column() on)
// of each of its rows: row(block, r) for kBlocks blocks of kBlockRows rows.
#pragma once
#include <cstring>

#include "../../device.cuh"
#include "ptx.cuh"

namespace fastmoe_cpp::cuda::portable {

// Byte offset of a chunk. The exclusive or spreads the eight chunks that one ldmatrix reads over all banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk, int row_bytes) {
  return row * row_bytes + (((chunk & ~7) | ((chunk ^ row) & 7)) << 4);
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t out;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    memcpy(&out, &v, 4);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    memcpy(&out, &v, 4);
  }
  return out;
}

// Lanes 4i .. 4i+3 hold rows of a 4x4 matrix of words; afterwards they hold its columns.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int d = 1; d <= 2; d *= 2) {
    const bool upper = threadIdx.x & d;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & d) continue;
      const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? w[i] : w[i + d], d);
      if (upper)
        w[i] = got;
      else
        w[i + d] = got;
    }
  }
}

template <class T_, int kWarpM, int kWarpN_, int kTileM, int kTileN, bool kAByRows, bool kBByRows>
class HalfMma {
 public:
  using T = T_;
  static constexpr int kWarpN = kWarpN_;
  static constexpr int kBlockK = 64, kSteps = 4;
  static constexpr bool kPipelined = true;  // the fragments of a step are loaded during the step before
  static constexpr int kBlocks = kWarpM / 16, kBlockRows = 2, kVector = kWarpN / 8;
  static constexpr bool kPacks = !kBByRows;  // packed() is cheaper than values()
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && (kBByRows || kWarpN == 64));

  struct Fragment {
    uint32_t a[kWarpM / 16][4], b[kWarpN / 16][4];
  };

  // Where the tile's column `c` lies, for an operand by rows: ldmatrix deals out two columns of every eight to a thread,
  // so neighbours for one thread are put 8 apart.
  static __device__ int shared_row(int c) {
    const int group = c / (kWarpN / 2), in = c % (kWarpN / 2);
    return group * (kWarpN / 2) + in % kVector / 2 * 8 + in / kVector * 2 + in % 2;
  }

  __device__ HalfMma(int warp_m, int warp_n) : warp_m_(warp_m) {
    const int lane = lane_id(), low = lane & 7;
    if constexpr (kAByRows) {
      a_ = chunk_offset(warp_m * kWarpM + (lane & 15), lane >> 4, 128);
    } else {
      a_ = chunk_offset((lane >> 4) * 8 + low, warp_m * (kWarpM / 8) + (lane >> 3 & 1), kTileM * 2);
    }
    if constexpr (kBByRows) {
      b_ = chunk_offset(warp_n * kWarpN + (lane >> 4) * 8 + low, lane >> 3 & 1, 128);
    } else {
      b_ = chunk_offset((lane >> 3 & 1) * 8 + low, warp_n * (kWarpN / 8) + (lane >> 4), kTileN * 2);
    }
    keep_in_register(a_);
    keep_in_register(b_);
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sum_[i][j][k] = 0;
      }
    }
  }

  __device__ void load(Fragment& f, SharedAddress a, SharedAddress b, int step) const {
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
      if constexpr (kAByRows) {
        load_matrices(f.a[i], ((a + a_) ^ (step * 32)) + i * 16 * 128);
      } else {
        load_matrices_transposed(f.a[i], ((a + a_) ^ (i * 32)) + step * 16 * kTileM * 2);
      }
    }
#pragma unroll
    for (int j = 0; j < kWarpN / 16; ++j) {
      if constexpr (kBByRows) {
        load_matrices(f.b[j], ((b + b_) ^ (step * 32)) + j * 16 * 128);
      } else {
        load_matrices_transposed(f.b[j], ((b + b_) ^ (j * 32)) + step * 16 * kTileN * 2);
      }
    }
  }

  // Scales a step of A along the contraction; `scale` is in shared memory, one float an element of the block.
  __device__ void scale(Fragment& f, const float* scale, int step) const {
    const int k = step * 16 + lane_id() % 4 * 2;
    const uint32_t by[2] = {pack_pair<T>(scale[k], scale[k + 1]), pack_pair<T>(scale[k + 8], scale[k + 9])};
#pragma unroll
    for (auto& a : f.a) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = multiply_pairs(a[i], by[i / 2]);
    }
  }

  __device__ void multiply(const Fragment& f) {
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j)
        multiply_add<T>(sum_[i][j], f.a[i], f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]);
    }
  }

  __device__ int row(int block, int r) const { return warp_m_ * kWarpM + block * 16 + r * 8 + lane_id() / 4; }
  __device__ int column() const { return lane_id() % 4 * kVector; }  // within a group

  // All lanes of a warp call these together.
  __device__ void values(int block, int r, int group, float (&v)[kVector]) const {
    if constexpr (kBByRows) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = sum_[block][group * (kVector / 2) + i / 2][r * 2 + i % 2];
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = __float_as_uint(sum_[block][group * 4 + i][r * 2 + h]);
        transpose_quad(w);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i * 2 + h] = __uint_as_float(w[i]);
      }
    }
  }
  __device__ Vec<T, 8> packed(int block, int r, int group) const {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = pack_pair<T>(sum_[block][group * 4 + i][r * 2], sum_[block][group * 4 + i][r * 2 + 1]);
    transpose_quad(w);
    Vec<T, 8> out;
    memcpy(&out, w, sizeof(out));
    return out;
  }
  // Block 1 becomes block 0, and so on: for loops over blocks that are not unrolled. (Not by memcpy: nvcc 13.0 drops half
  // of a copy of 128 bytes between rows of a register array.)
  __device__ void rotate() {
#pragma unroll
    for (int i = 0; i + 1 < kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sum_[i][j][k] = sum_[i + 1][j][k];
      }
    }
  }

 private:
  static __device__ uint32_t multiply_pairs(uint32_t x, uint32_t y) {
    using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
    Pair a, b;
    memcpy(&a, &x, 4);
    memcpy(&b, &y, 4);
    a = __hmul2(a, b);
    memcpy(&x, &a, 4);
    return x;
  }

  int warp_m_;
  int a_, b_;  // this lane's offsets into a stage
  float sum_[kWarpM / 16][kWarpN / 8][4];
};

template <class T_, int kWarpM, int kTileM, int kTileN, bool kAByRows, bool kBByRows>
class SimtMma {
 public:
  using T = T_;
  static constexpr int kWarpN = 64;
  static constexpr int kChunk = 16 / sizeof(T), kBlockK = 128 / sizeof(T), kSteps = 8;
  static constexpr bool kPipelined = false;
  static constexpr int kBlocks = kWarpM / 8, kBlockRows = 1, kVector = 8;
  static constexpr bool kPacks = false, kFolds = sizeof(T) == 4;

  struct Fragment {
    T a[kBlocks][kChunk], b[2][kVector][kChunk];
  };

  static __device__ int shared_row(int c) { return c / 32 * 32 + c % 8 * 4 + c % 32 / 8; }

  __device__ SimtMma(int warp_m, int warp_n)
      : m_(warp_m * kWarpM + lane_id() / 4), n_(warp_n * kWarpN), quad_(lane_id() % 4) {}

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kVector; ++j) sum_[i][j / kVector][j % kVector] = part_[i][j / kVector][j % kVector] = 0;
    }
  }

  // At the end of a block. Sums of sums of 32 products keep float32 as exact as BLAS libraries do.
  __device__ void fold() {
    if constexpr (!kFolds) return;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kVector; ++j) {
        sum_[i][j / kVector][j % kVector] += part_[i][j / kVector][j % kVector];
        part_[i][j / kVector][j % kVector] = 0;
      }
    }
  }

  __device__ void load(Fragment& f, SharedAddress a, SharedAddress b, int step) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int m = m_ + i * 8;
      if constexpr (kAByRows) {
        const auto v = load_shared<Vec<T, kChunk>>(a + chunk_offset(m, step, 128));
        memcpy(f.a[i], &v, 16);
      } else {
#pragma unroll
        for (int k = 0; k < kChunk; ++k)
          f.a[i][k] = load_shared<Vec<T, 1>>(a + chunk_offset(step * kChunk + k, m / kChunk, kTileM * sizeof(T)) +
                                             m % kChunk * sizeof(T))
                          .v[0];
      }
    }
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if constexpr (kBByRows) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const auto v = load_shared<Vec<T, kChunk>>(b + chunk_offset(n_ + g * 32 + j * 4 + quad_, step, 128));
          memcpy(f.b[g][j], &v, 16);
        }
      } else {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
#pragma unroll
          for (int c = 0; c < kVector / kChunk; ++c) {
            const int chunk = (n_ + g * 32 + quad_ * 8) / kChunk + c;
            const auto v = load_shared<Vec<T, kChunk>>(b + chunk_offset(step * kChunk + k, chunk, kTileN * sizeof(T)));
#pragma unroll
            for (int i = 0; i < kChunk; ++i) f.b[g][c * kChunk + i][k] = v.v[i];
          }
        }
      }
    }
  }

  __device__ void scale(Fragment& f, const T* scale, int step) const {
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) f.a[i][k] *= scale[step * kChunk + k];
    }
  }

  __device__ void multiply(const Fragment& f) {
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kVector; ++j) {
          T& sum = kFolds ? part_[i][j / kVector][j % kVector] : sum_[i][j / kVector][j % kVector];
          sum += f.a[i][k] * f.b[j / kVector][j % kVector][k];
        }
      }
    }
  }

  __device__ int row(int block, int) const { return m_ + block * 8; }
  __device__ int column() const { return quad_ * kVector; }
  __device__ void values(int block, int, int group, T (&v)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = sum_[block][group][i];
  }
  __device__ void rotate() {
#pragma unroll
    for (int i = 0; i + 1 < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kVector; ++j) sum_[i][j / kVector][j % kVector] = sum_[i + 1][j / kVector][j % kVector];
    }
  }

 private:
  int m_, n_, quad_;
  T sum_[kBlocks][2][kVector], part_[kBlocks][2][kVector];
};

}  // namespace fastmoe_cpp::cuda::portable
