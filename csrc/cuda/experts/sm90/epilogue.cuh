// What the products' epilogues are made of; each is in its product's file. A thread of a wgmma holds, in each block of 8
// columns b, columns 2q and 2q + 1 (q = lane % 4) of rows lane / 4 and lane / 4 + 8: accumulators 4b + 2h + {0, 1} for
// row half h.
// Four blocks are transposed within each quad of lanes, so that a lane holds 8 consecutive columns: 16-byte accesses.
//
// An epilogue has fetch(), called before a tile's main loop, and store(), called after it with what that returned. Or it
// has kHolds and pack(), which rounds the accumulators into half of their registers, and step<0>() to step<kSteps - 1>(),
// which store them under the main loop of the block's next tile, one in each block of its contraction. Word 2b + h of the
// packed tile holds columns 2q and 2q + 1 of block b, row half h.
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

// An accumulator's bits. The compiler sees no plain cast here: it would carry the accumulators as integers through the
// main loop, and the moves would make the wgmmas wait for each other.
__device__ __forceinline__ uint32_t bits_of(float accumulator) {
  uint32_t bits;
  asm("mov.b32 %0, %1;" : "=r"(bits) : "f"(accumulator));
  return bits;
}

// kOnce: leaves the L2 cache first.
template <bool kOnce = false>
__device__ __forceinline__ void store_16(void* destination, const uint32_t (&v)[4]) {
  uint4* const to = static_cast<uint4*>(destination);
  const uint4 value = make_uint4(v[0], v[1], v[2], v[3]);
  if constexpr (kOnce) {
    __stcs(to, value);
  } else {
    *to = value;
  }
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
template <bool kOnce = false, typename T>
__device__ __forceinline__ void store_group(uint32_t (&v)[4], T* row, int column, int columns, bool valid) {
  transpose_quad(v);
  const int quad = threadIdx.x & 3;
  if (valid && column + quad * 8 < columns) store_16<kOnce>(row + quad * 8, v);
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
template <bool kOnce, typename T, int kCount>
__device__ __forceinline__ void store_group(const float (&accumulators)[kCount], int block, int h, T* row, int column,
                                            int columns, bool valid) {
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = pack<T>(accumulators[4 * (block + i) + 2 * h], accumulators[4 * (block + i) + 2 * h + 1]);
  }
  store_group<kOnce>(v, row, column, columns, valid);
}

// What an epilogue fetches before the main loop.
struct Nothing {};

}  // namespace fastmoe_cpp::cuda::sm90
