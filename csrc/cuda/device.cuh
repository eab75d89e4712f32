// What the kernels of the stages share: element types, vectors, order-preserving keys, warp reductions, a launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <type_traits>

#include "experts/experts.h"  // DType

namespace fastmoe_cpp::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// What sums and scores of elements of type T are kept in.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_acc(Acc<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// Two elements of a 16-bit type.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  } else {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  }
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

// Elements of T in one 16-byte access.
template <typename T>
inline constexpr int kVector = 16 / sizeof(T);

inline bool aligned_to(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// A row that is read once: no reason to keep it in L1.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_once(const T* p) {
  Vec<T, N> out;
  if constexpr (sizeof(out) == 16) {
    const int4 raw = __ldcs(reinterpret_cast<const int4*>(p));
    memcpy(&out, &raw, sizeof(out));
  } else {
    out = *reinterpret_cast<const Vec<T, N>*>(p);
  }
  return out;
}

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int d = kWarp / 2; d; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

// The largest number of the warp; NaN loses to every number.
template <typename T>
__device__ __forceinline__ T warp_max_number(T x) {
#pragma unroll
  for (int d = kWarp / 2; d; d /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, d));
  return x;
}

// Unsigned keys in the order of the numbers they stand for: 0 is below everything, NaN is kNanKey, then -inf upwards.
// Both zeros give one key.
inline constexpr unsigned kNanKey = 1;
template <typename A>
using Key = std::conditional_t<sizeof(A) == 8, unsigned long long, unsigned>;

__device__ __forceinline__ unsigned ordered_key(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return x != x ? kNanKey : bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ unsigned long long ordered_key(double x) {
  const long long bits = __double_as_longlong(x + 0.0);
  return x != x ? kNanKey
                : static_cast<unsigned long long>(bits) ^ (static_cast<unsigned long long>(bits >> 63) | (1ull << 63));
}
__device__ __forceinline__ float number_of(unsigned key) {
  const unsigned bits = key >> 31 ? key ^ 0x80000000u : ~key;
  return key == kNanKey ? __uint_as_float(0x7fffffffu) : __uint_as_float(bits);
}
__device__ __forceinline__ double number_of(unsigned long long key) {
  const unsigned long long bits = key >> 63 ? key ^ (1ull << 63) : ~key;
  return __longlong_as_double(key == kNanKey ? 0x7fffffffffffffffll : static_cast<long long>(bits));
}

__device__ __forceinline__ unsigned warp_max(unsigned x) { return __reduce_max_sync(kAllLanes, x); }
__device__ __forceinline__ unsigned long long warp_max(unsigned long long x) {
#pragma unroll
  for (int d = kWarp / 2; d; d /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, x, d);
    x = other > x ? other : x;
  }
  return x;
}

// No host sync on this path, so a bad id ends the kernel: one sentence, then a trap.
static __device__ __noinline__ void refuse_expert_id(long long pair, long long id, int experts) {
  printf("fastmoe_cpp: topk_ids at pair %lld (t * K + k) must be -1 (dropped) or between 0 and %d, got %lld\n", pair,
         experts - 1, id);
  __trap();
}
__device__ __forceinline__ void require_expert_id(int64_t pair, int64_t id, int experts) {
  if (id < -1 || id >= experts) refuse_expert_id(pair, id, experts);
}

// A kernel's launches may ask for so much dynamic shared memory on the current device: above 48 KiB that has to be said
// before. What other threads were allowed is never taken back.
template <auto kKernel>
cudaError_t allow_shared_memory(size_t bytes) {
  static std::mutex mutex;
  static std::map<int, size_t> allowed;
  int device = 0;
  if (const auto e = cudaGetDevice(&device)) return e;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[device];
  if (bytes <= most) return cudaSuccess;
  if (const auto e =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
    return e;
  most = bytes;
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// f(zero of the element type) for a runtime dtype.
template <typename F>
cudaError_t with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(__nv_bfloat16{});
    case DType::f16: return f(__half{});
  }
  return cudaErrorInvalidValue;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastmoe_cpp::cuda
