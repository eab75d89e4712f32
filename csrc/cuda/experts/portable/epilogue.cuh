// What happens to a tile's sums on their way out of the registers.
#pragma once
#include "arguments.h"
#include "config.h"
#include "mma.cuh"
#include "schedule.cuh"

namespace fastmoe_cpp::cuda::portable {

// The first `valid` of N neighbouring elements, in 16-byte accesses where kVectorised: `valid` is then a multiple of
// such an access. Elements past `valid` load as 0.
template <bool kVectorised, class T, int N>
__device__ __forceinline__ void load_row(const T* from, Acc<T> (&v)[N], int valid) {
  constexpr int kEach = N < 16 / int(sizeof(T)) ? N : 16 / int(sizeof(T));
#pragma unroll
  for (int c = 0; c < N; c += kEach) {
    if constexpr (kVectorised) {
      Vec<T, kEach> x{};
      if (c < valid) x = *reinterpret_cast<const Vec<T, kEach>*>(from + c);
#pragma unroll
      for (int i = 0; i < kEach; ++i) v[c + i] = to_acc(x.v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) v[c + i] = c + i < valid ? to_acc(from[c + i]) : Acc<T>(0);
    }
  }
}

template <bool kVectorised, class T, int N>
__device__ __forceinline__ void store_row(T* to, const Acc<T> (&v)[N], int valid) {
  constexpr int kEach = N < 16 / int(sizeof(T)) ? N : 16 / int(sizeof(T));
#pragma unroll
  for (int c = 0; c < N; c += kEach) {
    if constexpr (kVectorised) {
      Vec<T, kEach> x;
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < kEach; i += 2) {
          const uint32_t w = pack_pair<T>(v[c + i], v[c + i + 1]);
          memcpy(&x.v[i], &w, 4);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) x.v[i] = v[c + i];
      }
      if (c < valid) *reinterpret_cast<Vec<T, kEach>*>(to + c) = x;
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (c + i < valid) to[c + i] = from_acc<T>(v[c + i]);
    }
  }
}

// f(block of sums, block, row of the block) for every row a thread holds. Unrolled it is fastest; otherwise the code of
// f stands there once a row of a block.
template <bool kUnrolled, class Mma, class F>
__device__ __forceinline__ void for_each_row(Mma& mma, F&& f) {
  if constexpr (kUnrolled) {
#pragma unroll
    for (int block = 0; block < Mma::kBlocks; ++block) {
#pragma unroll
      for (int r = 0; r < Mma::kBlockRows; ++r) f(block, block, r);
    }
  } else {
#pragma unroll 1
    for (int block = 0; block < Mma::kBlocks; ++block) {
#pragma unroll
      for (int r = 0; r < Mma::kBlockRows; ++r) f(0, block, r);
      mma.rotate();
    }
  }
}

template <Activation A>
using ActivationConstant = std::integral_constant<Activation, A>;

template <class F>
__device__ __forceinline__ void with_activation(Activation a, F&& f) {
  switch (a) {
    case Activation::SwiGLU: return f(ActivationConstant<Activation::SwiGLU>{});
    case Activation::GeGLU: return f(ActivationConstant<Activation::GeGLU>{});
    case Activation::GeGLUTanh: return f(ActivationConstant<Activation::GeGLUTanh>{});
    case Activation::ReGLU: return f(ActivationConstant<Activation::ReGLU>{});
    case Activation::ClampedSwiGLU: return f(ActivationConstant<Activation::ClampedSwiGLU>{});
    case Activation::SiLU: return f(ActivationConstant<Activation::SiLU>{});
    case Activation::GELU: return f(ActivationConstant<Activation::GELU>{});
    case Activation::GELUTanh: return f(ActivationConstant<Activation::GELUTanh>{});
    case Activation::ReLU: return f(ActivationConstant<Activation::ReLU>{});
    default: return f(ActivationConstant<Activation::ReLU2>{});
  }
}

// up: pre_activation = sums (* weight) + bias, act = f(pre_activation).
template <class Traits, bool kGated, bool kSwiGLU, class Mma>
__device__ __forceinline__ void up_epilogue(const Arguments& args, const Tile& tile, Mma& mma, int warp_n) {
  using T = typename Traits::T;
  using A = Acc<T>;
  constexpr int kVector = Mma::kVector, kWarpN = Traits::kWarpN;
  constexpr bool kVectorised = Traits::kVectorised;
  const int64_t pre_stride = kGated ? 2 * int64_t{args.columns} : args.columns;
  const T* bias = static_cast<const T*>(args.bias) + (args.bias ? tile.expert * pre_stride : 0);
  T *pre = static_cast<T*>(args.pre), *act = static_cast<T*>(args.out);
  const A* weights = static_cast<const A*>(args.weights);
  const A alpha = static_cast<A>(args.alpha), limit = static_cast<A>(args.limit);

  for_each_row<kSwiGLU>(mma, [&](int sums, int block, int r) {
    const int row = mma.row(block, r);
    if (row >= tile.rows) return;
    const int64_t slot = tile.row + row;
    const A weight = weights ? weights[args.slot_index[slot]] : A(1);
#pragma unroll
    for (int group = 0; group < (kGated ? 1 : 2); ++group) {
      const int column =
          tile.column + mma.column() + (kGated ? warp_n * (kWarpN / 2) : warp_n * kWarpN + group * (kWarpN / 2));
      const int valid = args.columns - column;
      if (valid <= 0) continue;
      A gate[kVector], up[kVector];
      mma.values(sums, r, group, gate);
      if constexpr (kGated) mma.values(sums, r, 1, up);
      if (weights) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          gate[i] *= weight;
          if constexpr (kGated) up[i] *= weight;
        }
      }
      if (args.bias) {
        A gate_bias[kVector], up_bias[kVector];
        if (kGated && args.alternate) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const int c = i < valid ? 2 * (column + i) : 0;
            gate_bias[i] = to_acc(bias[c]);
            up_bias[i] = to_acc(bias[c + 1]);
          }
        } else {
          load_row<kVectorised>(bias + column, gate_bias, valid);
          if constexpr (kGated) load_row<kVectorised>(bias + args.columns + column, up_bias, valid);
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          gate[i] += gate_bias[i];
          if constexpr (kGated) up[i] += up_bias[i];
        }
      }
      if (pre) {
        store_row<kVectorised>(pre + slot * pre_stride + column, gate, valid);
        if constexpr (kGated) store_row<kVectorised>(pre + slot * pre_stride + args.columns + column, up, valid);
      }
      if (act) {
        A out[kVector];
        if constexpr (kSwiGLU) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) out[i] = gate[i] * fast_sigmoid(gate[i]) * up[i];
        } else {
          with_activation(args.activation, [&](auto a) {
            if constexpr (is_gated(decltype(a)::value) == kGated) {
#pragma unroll
              for (int i = 0; i < kVector; ++i)
                out[i] = activate<decltype(a)::value, A>(gate[i], kGated ? up[i] : A(0), alpha, limit);
            }
          });
        }
        store_row<kVectorised>(act + slot * args.columns + column, out, valid);
      }
    }
  });
}

// linear, linear_grad, weight_grad: rows of the result, + bias.
template <class Traits, class Mma>
__device__ __forceinline__ void plain_epilogue(const Arguments& args, const Tile& tile, Mma& mma, int warp_n) {
  using T = typename Traits::T;
  constexpr int kVector = Mma::kVector, kWarpN = Traits::kWarpN;
  const T* bias = static_cast<const T*>(args.bias);
  T* out = static_cast<T*>(args.out);
  if (Traits::kWeightGrad) out += static_cast<int64_t>(tile.expert) * args.rows * args.columns;
  if (bias) bias += static_cast<int64_t>(tile.expert) * args.columns;
  for_each_row<true>(mma, [&](int sums, int block, int r) {
    const int row = mma.row(block, r);
    const int64_t to = Traits::kWeightGrad ? weight_row(tile.row + row, args.alternate) : tile.row + row;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const int column = tile.column + warp_n * kWarpN + group * (kWarpN / 2) + mma.column();
      const int valid = row < tile.rows ? args.columns - column : 0;
      T* at = out + to * args.columns + column;
      if constexpr (Mma::kPacks && Traits::kVectorised) {
        const Vec<T, 8> v = mma.packed(sums, r, group);
        if (valid > 0) *reinterpret_cast<Vec<T, 8>*>(at) = v;
      } else {
        Acc<T> v[kVector];
        mma.values(sums, r, group, v);
        if (valid <= 0) continue;
        if (bias) {
          Acc<T> b[kVector];
          load_row<Traits::kVectorised>(bias + column, b, valid);
#pragma unroll
          for (int i = 0; i < kVector; ++i) v[i] += b[i];
        }
        store_row<Traits::kVectorised>(at, v, valid);
      }
    }
  });
}

// act_grad reads a tile of the pre-activation at its end; this brings it into L2 at its beginning.
template <class Traits>
__device__ __forceinline__ void prefetch_pre_activation(const Arguments& args, const Tile& tile) {
  using T = typename Traits::T;
  constexpr int kLine = 128 / sizeof(T), kLines = Traits::kTileN / kLine;
  const int halves = args.gated ? 2 : 1;
  for (int i = threadIdx.x; i < tile.rows * kLines; i += Traits::kThreads) {
    const int column = tile.column + i % kLines * kLine;
    if (column >= args.columns) continue;
    const T* line =
        static_cast<const T*>(args.pre) + static_cast<int64_t>(tile.row + i / kLines) * halves * args.columns + column;
    prefetch_l2(line);
    if (args.gated) prefetch_l2(line + args.columns);
  }
}

// act_grad: the sums are dA; see ActGradParams.
template <class Traits, bool kGated, bool kSwiGLU, class Mma>
__device__ __forceinline__ void act_grad_epilogue(const Arguments& args, const Tile& tile, Mma& mma, int warp_n) {
  using T = typename Traits::T;
  using A = Acc<T>;
  constexpr int kVector = Mma::kVector, kWarpN = Traits::kWarpN;
  constexpr bool kVectorised = Traits::kVectorised;
  const int64_t stride = kGated ? 2 * int64_t{args.columns} : args.columns;
  const T* pre = static_cast<const T*>(args.pre);
  T *grad_pre = static_cast<T*>(args.grad_pre), *scaled_act = static_cast<T*>(args.out);
  const A* weights = static_cast<const A*>(args.weights);
  const A alpha = static_cast<A>(args.alpha), limit = static_cast<A>(args.limit);
  const int warp_column = tile.column + warp_n * kWarpN;

  for_each_row<false>(mma, [&](int sums, int block, int r) {
    const int row = mma.row(block, r);
    const bool exists = row < tile.rows;
    const int64_t slot = tile.row + row;
    const A weight = weights && exists ? weights[args.slot_index[slot]] : A(1);
    A dot = 0;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const int column = warp_column + group * (kWarpN / 2) + mma.column();
      const int valid = exists ? args.columns - column : 0;
      A gate[kVector], up[kVector], grad[kVector], value[kVector];
      load_row<kVectorised>(pre + slot * stride + column, gate, valid);
      if constexpr (kGated) load_row<kVectorised>(pre + slot * stride + args.columns + column, up, valid);
      mma.values(sums, r, group, grad);
      if (valid <= 0) continue;
      const auto row_grad = [&](auto a) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const A g = i < valid ? grad[i] : A(0);
          ActivationGrad<A> x;
          if constexpr (kSwiGLU) {
            const A s = fast_sigmoid(gate[i]), silu = gate[i] * s, by = g * weight;
            x = {silu * up[i], by * up[i] * (s + silu * (A(1) - s)), by * silu};
          } else {
            x = activate_backward<decltype(a)::value, A>(gate[i], kGated ? up[i] : A(0), g * weight, alpha, limit);
          }
          if (i < valid) dot += g * x.value;
          gate[i] = x.grad_gate;
          up[i] = x.grad_up;
          value[i] = x.value * weight;
        }
      };
      if constexpr (kSwiGLU) {
        row_grad(ActivationConstant<Activation::SwiGLU>{});
      } else {
        with_activation(args.activation, [&](auto a) {
          if constexpr (is_gated(decltype(a)::value) == kGated) row_grad(a);
        });
      }
      if (grad_pre) {
        store_row<kVectorised>(grad_pre + slot * stride + column, gate, valid);
        if constexpr (kGated) store_row<kVectorised>(grad_pre + slot * stride + args.columns + column, up, valid);
      }
      if (scaled_act) store_row<kVectorised>(scaled_act + slot * args.columns + column, value, valid);
    }
    if (args.partial_dot) {
      dot += __shfl_xor_sync(kAllLanes, dot, 1);
      dot += __shfl_xor_sync(kAllLanes, dot, 2);
      if (exists && warp_column < args.columns && lane_id() % 4 == 0)
        static_cast<A*>(args.partial_dot)[warp_column / kWarpN * args.slots + slot] = dot;
    }
  });
}

template <class Traits, class Mma>
__device__ __forceinline__ void epilogue(const Arguments& args, const Tile& tile, Mma& mma, int warp_n, bool active) {
  if (!active) return;
  if constexpr (Traits::kKind == Kind::up || Traits::kKind == Kind::act_grad) {
    const auto run = [&](auto gated, auto swiglu) {
      if constexpr (Traits::kKind == Kind::up)
        up_epilogue<Traits, decltype(gated)::value, decltype(swiglu)::value>(args, tile, mma, warp_n);
      else
        act_grad_epilogue<Traits, decltype(gated)::value, decltype(swiglu)::value>(args, tile, mma, warp_n);
    };
    if constexpr (Traits::kHalf && Traits::kVectorised) {
      if (args.activation == Activation::SwiGLU) return run(std::true_type{}, std::true_type{});
    }
    if (args.gated)
      run(std::true_type{}, std::false_type{});
    else
      run(std::false_type{}, std::false_type{});
  } else {
    plain_epilogue<Traits>(args, tile, mma, warp_n);
  }
}

}  // namespace fastmoe_cpp::cuda::portable
