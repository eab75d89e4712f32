// What happens to a slot's sums: a lane has those of one slot for the item's rows of the weight.
#pragma once
#include "../portable/epilogue.cuh"
#include "stream.cuh"

namespace fastmoe_cpp::cuda::gemv {

// up: pre_activation[s] = sums * scale(s) + bias[e]; act[s] = f(pre_activation[s]) of the unrounded pre-activation.
// down: rows[s] = sums + bias[e]; combined, they go to shared memory instead (combine.cuh).
template <class Traits>
struct Epilogue {
  using T = typename Traits::T;
  static constexpr int kRows = Traits::kRows;
  static_assert(kRows == 2 || (kRows == 4 && !Traits::kGated));

  // The rows', as they were loaded, so that nothing waits for them: gated one in a word, otherwise two.
  struct alignas(8) Biases {
    uint32_t words[2];
  };

  // Before the main loop.
  __device__ static __forceinline__ Biases fetch(const Arguments& args, int expert, int group) {
    Biases biases{};
    if (args.bias == nullptr) return biases;
    const auto* const from = static_cast<const uint16_t*>(args.bias) + first_weight_row<Traits>(args, expert, group);
    if constexpr (Traits::kGated) {
      biases.words[0] = from[0];
      biases.words[1] = from[weight_row_step<Traits>(args)];
    } else if constexpr (kRows == 2) {
      biases.words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      biases = *reinterpret_cast<const Biases*>(from);
    }
    return biases;
  }

  // Of down: a slot's kRows columns of its row.
  __device__ static __forceinline__ Vec<T, kRows> row(const Arguments& args, const Biases& biases,
                                                      float (&sums)[kRows]) {
    add(args, biases, sums);
    return rounded(sums);
  }

  __device__ static __forceinline__ void store(const Arguments& args, int64_t slot, int group, const Biases& biases,
                                               float (&sums)[kRows]) {
    const int column = Traits::kGated ? group : group * kRows;
    if (Traits::kUp && args.scale != nullptr) {
      const float scale = args.scale[args.slot_index[slot]];
#pragma unroll
      for (int c = 0; c < kRows; ++c) sums[c] *= scale;
    }
    add(args, biases, sums);
    if constexpr (!Traits::kUp) {
      put(args.out, slot * args.columns + column, sums);
    } else if constexpr (Traits::kGated) {
      if (args.pre != nullptr) {
        T* const pre = static_cast<T*>(args.pre) + slot * 2 * args.columns + column;
        pre[0] = from_acc<T>(sums[0]);
        pre[args.columns] = from_acc<T>(sums[1]);
      }
      if (args.out == nullptr) return;
      portable::with_activation(args.activation, [&](auto a) {
        constexpr Activation kActivation = decltype(a)::value;
        if constexpr (is_gated(kActivation)) {
          static_cast<T*>(args.out)[slot * args.columns + column] =
              from_acc<T>(activate<kActivation, float>(sums[0], sums[1], args.alpha, args.limit));
        }
      });
    } else {
      if (args.pre != nullptr) put(args.pre, slot * args.columns + column, sums);
      if (args.out == nullptr) return;
      portable::with_activation(args.activation, [&](auto a) {
        constexpr Activation kActivation = decltype(a)::value;
        if constexpr (!is_gated(kActivation)) {
#pragma unroll
          for (int c = 0; c < kRows; ++c) {
            sums[c] = activate<kActivation, float>(sums[c], 0.0f, args.alpha, args.limit);
          }
        }
      });
      put(args.out, slot * args.columns + column, sums);
    }
  }

 private:
  __device__ static __forceinline__ void add(const Arguments& args, const Biases& biases, float (&sums)[kRows]) {
    if (args.bias == nullptr) return;
#pragma unroll
    for (int c = 0; c < kRows; ++c) {
      const float2 bias = unpack<T>(biases.words[Traits::kGated ? c : c / 2]);
      sums[c] += Traits::kGated || c % 2 == 0 ? bias.x : bias.y;
    }
  }

  __device__ static __forceinline__ Vec<T, kRows> rounded(const float (&values)[kRows]) {
    Vec<T, kRows> vec;
#pragma unroll
    for (int c = 0; c < kRows; ++c) vec.v[c] = from_acc<T>(values[c]);
    return vec;
  }

  __device__ static __forceinline__ void put(void* to, int64_t at, const float (&values)[kRows]) {
    *reinterpret_cast<Vec<T, kRows>*>(static_cast<T*>(to) + at) = rounded(values);
  }
};

}  // namespace fastmoe_cpp::cuda::gemv
