// What happens to a tile's accumulators. A thread of a wgmma holds, in each block of 8 columns b, columns
// 2q and 2q + 1 (q = lane % 4) of rows lane / 4 and lane / 4 + 8: accumulators 4b + 2h + {0, 1} for row half h.
// Four blocks are transposed within each quad of lanes, so that a lane holds 8 consecutive columns: 16-byte accesses.
//
// Where kHolds, the accumulators are rounded and packed into half of their registers, and stored under the main loop of
// the block's next tile, a step in each block of its contraction: pack(), then step<0>() to step<kSteps - 1>(). Word
// 2b + h of the packed tile holds columns 2q and 2q + 1 of block b, row half h.
#pragma once
#include "../../../activation.h"
#include "gemm.cuh"

namespace fastmoe_cpp::cuda::sm90 {

// v[i] of lane q becomes v[q] of lane i, within each quad.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  uint32_t a = __shfl_xor_sync(0xFFFFFFFF, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(0xFFFFFFFF, odd ? v[2] : v[3], 1);
  v[0] = odd ? a : v[0], v[1] = odd ? v[1] : a;
  v[2] = odd ? b : v[2], v[3] = odd ? v[3] : b;
  a = __shfl_xor_sync(0xFFFFFFFF, high ? v[0] : v[2], 2), b = __shfl_xor_sync(0xFFFFFFFF, high ? v[1] : v[3], 2);
  v[0] = high ? a : v[0], v[2] = high ? v[2] : a;
  v[1] = high ? b : v[1], v[3] = high ? v[3] : b;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  } else {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  }
}

// An accumulator's bits. The compiler sees no plain cast here: it would carry the accumulators as integers through the
// main loop, and the moves would make the wgmmas wait for each other.
__device__ __forceinline__ uint32_t bits_of(float accumulator) {
  uint32_t bits;
  asm("mov.b32 %0, %1;" : "=r"(bits) : "f"(accumulator));
  return bits;
}

__device__ __forceinline__ void store_16(void* destination, const uint32_t (&v)[4]) {
  *reinterpret_cast<uint4*>(destination) = make_uint4(v[0], v[1], v[2], v[3]);
}

// Four instructions; relative error about 2^-22.
__device__ __forceinline__ float fast_sigmoid(float x) {
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
}

template <Activation kActivation>
__device__ __forceinline__ float value_of(float gate, float up, float alpha, float limit) {
  if constexpr (kActivation == Activation::SwiGLU) return gate * fast_sigmoid(gate) * up;
  return activate<kActivation, float>(gate, up, alpha, limit);
}

template <Activation kActivation>
__device__ __forceinline__ ActivationGrad<float> gradient_of(float gate, float up, float grad, float alpha,
                                                             float limit) {
  if constexpr (kActivation == Activation::SwiGLU) {
    const float s = fast_sigmoid(gate), value = gate * s;
    return {value * up, grad * up * (s + value * (1.0f - s)), grad * value};
  }
  return activate_backward<kActivation, float>(gate, up, grad, alpha, limit);
}

template <Activation kActivation>
using ActivationTag = std::integral_constant<Activation, kActivation>;

// Runs body(ActivationTag<A>) for the activation at hand; swiglu alone where kSwiGLU, so that the common kernel is
// small.
template <bool kGated, bool kSwiGLU, class Body>
__device__ __forceinline__ void with_activation(Activation activation, Body&& body) {
  if constexpr (kSwiGLU) {
    body(ActivationTag<Activation::SwiGLU>{});
  } else if constexpr (kGated) {
    switch (activation) {
      case Activation::GeGLU: return body(ActivationTag<Activation::GeGLU>{});
      case Activation::GeGLUTanh: return body(ActivationTag<Activation::GeGLUTanh>{});
      case Activation::ReGLU: return body(ActivationTag<Activation::ReGLU>{});
      default: return body(ActivationTag<Activation::ClampedSwiGLU>{});
    }
  } else {
    switch (activation) {
      case Activation::SiLU: return body(ActivationTag<Activation::SiLU>{});
      case Activation::GELU: return body(ActivationTag<Activation::GELU>{});
      case Activation::GELUTanh: return body(ActivationTag<Activation::GELUTanh>{});
      case Activation::ReLU: return body(ActivationTag<Activation::ReLU>{});
      default: return body(ActivationTag<Activation::ReLU2>{});
    }
  }
}

// Row of the tile of this thread's row half h.
__device__ __forceinline__ int row_of(int first_row, int h) {
  return first_row + ((threadIdx.x >> 5) & 3) * 16 + ((threadIdx.x & 31) >> 2) + 8 * h;
}

template <class G>
__device__ __forceinline__ void pack_tile(const float (&accumulators)[G::kN / 2], Packed<G>& words) {
#pragma unroll
  for (int i = 0; i < G::kN / 4; ++i) words[i] = pack<typename G::T>(accumulators[2 * i], accumulators[2 * i + 1]);
}

// Stores 32 columns of one row half, a word of each of four blocks; `row` points to the first.
template <typename T>
__device__ __forceinline__ void store_group(uint32_t (&v)[4], T* row, int column, int columns, bool valid) {
  transpose_quad(v);
  const int quad = threadIdx.x & 3;
  if (valid && column + quad * 8 < columns) store_16(row + quad * 8, v);
}

// The same from blocks `block` to block + 3 of a packed tile.
template <typename T, int kCount>
__device__ __forceinline__ void store_group(const uint32_t (&words)[kCount], int block, int h, T* row, int column,
                                            int columns, bool valid) {
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = words[2 * (block + i) + h];
  store_group(v, row, column, columns, valid);
}

// The same from accumulators.
template <typename T, int kCount>
__device__ __forceinline__ void store_group(const float (&accumulators)[kCount], int block, int h, T* row, int column,
                                            int columns, bool valid) {
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = pack<T>(accumulators[4 * (block + i) + 2 * h], accumulators[4 * (block + i) + 2 * h + 1]);
  }
  store_group(v, row, column, columns, valid);
}

// What an epilogue fetches before the main loop.
struct Nothing {};

// rows[s] = accumulators (+ bias[e])
struct RowsEpilogue {
  static constexpr bool kHolds = true;
  static constexpr int kInputHalves = 0;
  template <class G>
  static constexpr int kSteps = G::kN / 64;
  struct Params {
    void* out;         // [P, columns]
    const void* bias;  // [E, columns] or null
    int columns;
  };

  template <class G>
  __device__ static void pack(const Arguments<G>& args, const Tile& tile, int, float (&accumulators)[G::kN / 2],
                              Packed<G>& words) {
    using T = typename G::T;
    const Params& params = args.epilogue;
    if (params.bias != nullptr) {
      const T* const bias = static_cast<const T*>(params.bias) + static_cast<int64_t>(tile.expert) * params.columns;
#pragma unroll
      for (int b = 0; b < G::kN / 8; ++b) {
        const int c = tile.n * G::kN + 8 * b + 2 * (threadIdx.x & 3);
        const float2 add = c < params.columns ? unpack<T>(*reinterpret_cast<const uint32_t*>(bias + c)) : float2{0, 0};
        accumulators[4 * b] += add.x, accumulators[4 * b + 1] += add.y;
        accumulators[4 * b + 2] += add.x, accumulators[4 * b + 3] += add.y;
      }
    }
    pack_tile<G>(accumulators, words);
  }

  template <class G, int kStep>
  __device__ static void step(const Arguments<G>& args, const Tile& tile, int first_row, const Packed<G>& words) {
    using T = typename G::T;
    const int columns = args.epilogue.columns;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_of(first_row, h), column = tile.n * G::kN + kStep * 64;
      T* const out = static_cast<T*>(args.epilogue.out) + static_cast<int64_t>(tile.first + row) * columns + column;
#pragma unroll
      for (int b = 0; b < 8; b += 4) {
        store_group(words, kStep * 8 + b, h, out + b * 8, column + b * 8, columns, row < tile.rows);
      }
    }
  }
};

// pre_activation[s] = accumulators * scale(s) + bias[e]; act[s] = f(pre_activation[s]) of the unrounded pre-activation.
template <bool kGated, bool kSwiGLU>
struct UpEpilogue {
  static constexpr bool kHolds = false;
  static constexpr int kInputHalves = 0;
  struct Params {
    void *pre_activation, *act;  // [P, up_rows] or null, [P, I] or null
    const void* bias;            // [E, up_rows] or null
    const float* scale;          // routing weights [T, K], or null
    int intermediate;
    bool interleaved;
    Activation activation;
    float alpha, limit;
  };

  using Ahead = Nothing;
  template <class G>
  __device__ static Ahead fetch(const Arguments<G>&, const Tile&, int) {
    return {};
  }

  template <class G>
  __device__ static void store(const Arguments<G>& args, const Tile& tile, int first_row,
                               float (&accumulators)[G::kN / 2], const Ahead& ahead, const Ring& ring,
                               Position<G::kStages>& position) {
    const Params& params = args.epilogue;
    if (params.scale != nullptr) scale_rows<G>(args, tile, first_row, accumulators);
    if (params.bias != nullptr) add_bias<G>(args, tile, accumulators);
    using T = typename G::T;
    constexpr int kColumns = kGated ? G::kN / 2 : G::kN;
    const int column = tile.n * kColumns, intermediate = params.intermediate;
    if (params.pre_activation != nullptr) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(first_row, h);
        T* const pre = static_cast<T*>(params.pre_activation) +
                       static_cast<int64_t>(tile.first + row) * intermediate * (kGated ? 2 : 1) + column;
#pragma unroll
        for (int b = 0; b < kColumns / 8; b += 4) {
          const int c = column + b * 8;
          store_group<T>(accumulators, b, h, pre + b * 8, c, intermediate, row < tile.rows);
          if constexpr (kGated) {
            store_group<T>(accumulators, b + kColumns / 8, h, pre + intermediate + b * 8, c, intermediate,
                           row < tile.rows);
          }
        }
      }
    }
    if (params.act == nullptr) return;
    with_activation<kGated, kSwiGLU>(params.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(first_row, h);
        T* const act = static_cast<T*>(params.act) + static_cast<int64_t>(tile.first + row) * intermediate + column;
#pragma unroll
        for (int b = 0; b < kColumns / 8; b += 4) {
          uint32_t v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int gate = 4 * (b + i) + 2 * h, up = kGated ? gate + kColumns / 2 : gate;
            v[i] = pack<T>(
                value_of<kActivation>(accumulators[gate], accumulators[up], params.alpha, params.limit),
                value_of<kActivation>(accumulators[gate + 1], accumulators[up + 1], params.alpha, params.limit));
          }
          store_group(v, act + b * 8, column + b * 8, intermediate, row < tile.rows);
        }
      }
    });
  }

 private:
  template <class G>
  __device__ static void scale_rows(const Arguments<G>& args, const Tile& tile, int first_row,
                                    float (&accumulators)[G::kN / 2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_of(first_row, h);
      const float scale = row < tile.rows ? args.epilogue.scale[args.slot_index[tile.first + row]] : 0.0f;
#pragma unroll
      for (int b = 0; b < G::kN / 8; ++b) {
        accumulators[4 * b + 2 * h] *= scale;
        accumulators[4 * b + 2 * h + 1] *= scale;
      }
    }
  }

  template <class G>
  __device__ static void add_bias(const Arguments<G>& args, const Tile& tile, float (&accumulators)[G::kN / 2]) {
    using T = typename G::T;
    const Params& params = args.epilogue;
    constexpr int kColumns = kGated ? G::kN / 2 : G::kN;
    const int intermediate = params.intermediate, stride = kGated && params.interleaved ? 2 : 1;
    const T* const bias = static_cast<const T*>(params.bias) +
                          static_cast<int64_t>(tile.expert) * intermediate * (kGated ? 2 : 1) +
                          stride * (tile.n * kColumns + 2 * (threadIdx.x & 3));
    const int to_up = stride == 2 ? 1 : intermediate, left = intermediate - tile.n * kColumns - 2 * (threadIdx.x & 3);
#pragma unroll
    for (int b = 0; b < kColumns / 8; ++b) {
      if (b % 4 == 0) asm volatile("" ::: "memory");  // more loads at a time would spill
#pragma unroll
      for (int half = 0; half < (kGated ? 2 : 1); ++half) {
        // I is even, and so are the columns
        const T* const at = bias + stride * 8 * b + half * to_up;
        const float2 add =
            8 * b < left ? float2{static_cast<float>(at[0]), static_cast<float>(at[stride])} : float2{0, 0};
        const int to = 4 * (b + half * kColumns / 8);
        accumulators[to] += add.x, accumulators[to + 1] += add.y;
        accumulators[to + 2] += add.x, accumulators[to + 3] += add.y;
      }
    }
  }
};

// dA = accumulators: takes the pre-activation from the ring's stages that follow the tile's own, recomputes A, writes
// f'(pre) * w * dA, w * A, and the tile's share of <dA, A>.
template <bool kGated, bool kSwiGLU>
struct ActGradEpilogue {
  static constexpr bool kHolds = false;
  static constexpr int kInputHalves = kGated ? 2 : 1;
  struct Params {
    void *grad_pre, *scaled_act;  // [P, up_rows], [P, I]; or null
    float* partial;               // [n_tiles, P] or null
    const float* scale;           // routing weights [T, K], or null
    int64_t slots;
    int intermediate;
    Activation activation;
    float alpha, limit;
  };

  struct Ahead {
    float scale[2];  // of this thread's rows
  };
  // Two loads in a chain: they return under the main loop.
  template <class G>
  __device__ static Ahead fetch(const Arguments<G>& args, const Tile& tile, int first_row) {
    Ahead ahead{{1.0f, 1.0f}};
    if (args.epilogue.scale != nullptr) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(first_row, h);
        ahead.scale[h] = row < tile.rows ? args.epilogue.scale[args.slot_index[tile.first + row]] : 0.0f;
      }
    }
    return ahead;
  }

  template <class G>
  __device__ static void store(const Arguments<G>& args, const Tile& tile, int first_row,
                               float (&accumulators)[G::kN / 2], const Ahead& ahead, const Ring& ring,
                               Position<G::kStages>& position) {
    const Params& params = args.epilogue;
    with_activation<kGated, kSwiGLU>(params.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
      using T = typename G::T;
      static_assert(G::kCooperative);
      const int quad = threadIdx.x & 3, intermediate = params.intermediate, blocks = input_blocks_of(args, tile);
      T *grad_pre[2], *scaled_act[2];  // of this thread's rows, at the tile's first column
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t slot = tile.first + row_of(first_row, h), column = tile.n * G::kN + quad * 8;
        grad_pre[h] = static_cast<T*>(params.grad_pre) + slot * intermediate * (kGated ? 2 : 1) + column;
        scaled_act[h] = static_cast<T*>(params.scaled_act) + slot * intermediate + column;
      }
      const float (&scale)[2] = ahead.scale;
      float dot[2] = {0.0f, 0.0f};
#pragma unroll
      for (int block = 0; block < G::kN / 64; ++block) {
        if (block < blocks) {
          ptx::barrier_wait(ring.full + position.stage * 8, position.phase);
          const uint32_t input = ring.stages + position.stage * G::kStageBytes + first_row * 128;
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            const int h = step >> 1, group = step & 1, b = block * 8 + group * 4;
            const int row = row_of(first_row, h), c = tile.n * G::kN + b * 8 + quad * 8;
            const int local = row_of(0, h);
            const uint32_t address = input + local * 128 + (((group * 4 + quad) ^ (local & 7)) << 4);
            uint32_t gates[4], ups[4] = {};
            ptx::load_shared_16(gates, address);
            if constexpr (kGated) ptx::load_shared_16(ups, address + G::kM * 128);
            uint32_t low[4], high[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              low[i] = bits_of(accumulators[4 * (b + i) + 2 * h]);
              high[i] = bits_of(accumulators[4 * (b + i) + 2 * h + 1]);
            }
            transpose_quad(low);
            transpose_quad(high);
            uint32_t grad_gate[4], grad_up[4], act[4];
            float part = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 gate = unpack<T>(gates[i]), up = kGated ? unpack<T>(ups[i]) : float2{0, 0};
              const float da0 = __uint_as_float(low[i]), da1 = __uint_as_float(high[i]);
              const auto g0 = gradient_of<kActivation>(gate.x, up.x, da0 * scale[h], params.alpha, params.limit);
              const auto g1 = gradient_of<kActivation>(gate.y, up.y, da1 * scale[h], params.alpha, params.limit);
              part += da0 * g0.value + da1 * g1.value;
              grad_gate[i] = pack<T>(g0.grad_gate, g1.grad_gate);
              grad_up[i] = pack<T>(g0.grad_up, g1.grad_up);
              act[i] = pack<T>(g0.value * scale[h], g1.value * scale[h]);
            }
            if (row < tile.rows && c < intermediate) {
              dot[h] += part;
              if (params.grad_pre != nullptr) {
                store_16(grad_pre[h] + b * 8, grad_gate);
                if constexpr (kGated) store_16(grad_pre[h] + b * 8 + intermediate, grad_up);
              }
              if (params.scaled_act != nullptr) store_16(scaled_act[h] + b * 8, act);
            }
          }
          __syncwarp();
          release<G>(ring, position.stage);
          position.advance();
        }
      }
      if (params.partial != nullptr) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float sum = dot[h];
          sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
          sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
          const int row = row_of(first_row, h);
          if (quad == 0 && row < tile.rows && tile.n < args.n_tiles)
            params.partial[tile.n * params.slots + tile.first + row] = sum;
        }
      }
    });
  }
};

// grad[e] = accumulators; row m of the tile's columns is row `half * I + i` of a gate half then an up half. kAdds: grad is
// float32, and the accumulators are added to it.
template <bool kAdds>
struct WeightGradEpilogue {
  static constexpr bool kHolds = false;
  static constexpr int kInputHalves = 0;
  struct Params {
    void* grad;  // [E, rows, columns]
    int rows, columns;
    bool interleaved;  // rows alternate between the two halves

    __device__ __forceinline__ int64_t row_at(int expert, int row) const {
      const int half_rows = rows / 2;
      const int out_row = !interleaved ? row : row < half_rows ? 2 * row : 2 * (row - half_rows) + 1;
      return (static_cast<int64_t>(expert) * rows + out_row) * columns;
    }
  };

  using Ahead = Nothing;
  template <class G>
  __device__ static Ahead fetch(const Arguments<G>&, const Tile&, int) {
    return {};
  }

  template <class G>
  __device__ static void store(const Arguments<G>& args, const Tile& tile, int first_row,
                               float (&accumulators)[G::kN / 2], const Ahead&, const Ring&, Position<G::kStages>&) {
    const Params& params = args.epilogue;
    const int column = tile.n * G::kN;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = tile.m * G::kM + row_of(first_row, h);
      const int64_t at = params.row_at(tile.expert, row) + column;
      if constexpr (kAdds) {
        if (tile.rows > 0 && row < params.rows)
          add_row(accumulators, h, static_cast<float*>(params.grad) + at, params.columns - column);
      } else {
        using T = typename G::T;
        T* const out = static_cast<T*>(params.grad) + at;
#pragma unroll
        for (int b = 0; b < G::kN / 8; b += 4) {
          store_group<T>(accumulators, b, h, out + b * 8, column + b * 8, params.columns, row < params.rows);
        }
      }
    }
  }

 private:
  // A quad of lanes has a sector of 32 bytes of the row.
  template <int kCount>
  __device__ static void add_row(const float (&accumulators)[kCount], int h, float* out, int columns) {
    const int first = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int group = 0; group < kCount / 4; group += 8) {
      float2 sums[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = (group + i) * 8 + first;
        if (c < columns) sums[i] = *reinterpret_cast<const float2*>(out + c);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = (group + i) * 8 + first, from = 4 * (group + i) + 2 * h;
        if (c < columns) {
          *reinterpret_cast<float2*>(out + c) = {sums[i].x + accumulators[from], sums[i].y + accumulators[from + 1]};
        }
      }
    }
  }
};

}  // namespace fastmoe_cpp::cuda::sm90
