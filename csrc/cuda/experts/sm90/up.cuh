// up: gathered rows of x times gate_up, activation in the epilogue.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

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
          store_group<true, T>(accumulators, b, h, pre + b * 8, c, intermediate, row < tile.rows);
          if constexpr (kGated) {
            store_group<true, T>(accumulators, b + kColumns / 8, h, pre + intermediate + b * 8, c, intermediate,
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
          store_group<true>(v, act + b * 8, column + b * 8, intermediate, row < tile.rows);
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

template <class G>
cudaError_t run_up(const UpParams& p, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.b_map, gate_up_view(shape, p.gate_up), G::kBBoxRows));
  args.gathered = p.x;
  args.gathered_columns = shape.hidden;
  args.k_size = static_cast<int>(shape.hidden);
  args.n_size = static_cast<int>(shape.intermediate);
  args.n_tiles = static_cast<int>(ceil_div(shape.intermediate, G::kN / G::kHalves));
  args.epilogue = {p.pre_activation,
                   p.act,
                   p.gate_up_bias,
                   shape.weight_on_input ? p.plan.weights : nullptr,
                   args.n_size,
                   shape.interleaved,
                   shape.activation,
                   static_cast<float>(shape.alpha),
                   static_cast<float>(shape.limit)};
  return launch<G>(args, shape.slots(), stream);
}

template <typename T, bool kGated, bool kSwiGLU>
cudaError_t tile_up(const UpParams& p, cudaStream_t stream) {
  constexpr int kHalves = kGated ? 2 : 1;
  using Epilogue = UpEpilogue<kGated, kSwiGLU>;
  if (configure(Product::up, p.shape).tiling == Tiling::narrow) {
    return run_up<Gemm<T, Load::gathered_rows, Load::rows, false, 64, kHalves, false, 1, Epilogue>>(p, stream);
  }
  return run_up<Gemm<T, Load::gathered_rows, Load::rows, true, 256, kHalves, false, 2, Epilogue>>(p, stream);
}

template <typename T>
cudaError_t launch_up(const UpParams& p, cudaStream_t stream) {
  if (p.shape.activation == Activation::SwiGLU) return tile_up<T, true, true>(p, stream);
  return is_gated(p.shape.activation) ? tile_up<T, true, false>(p, stream) : tile_up<T, false, false>(p, stream);
}

}  // namespace fastmoe_cpp::cuda::sm90
