// down: act times down.T, and input_grad: grad_pre times gate_up; rows of slots in, rows of slots out.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

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

template <class G>
cudaError_t run_down(const DownParams& p, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.a_map, slots_view(shape, p.act, shape.intermediate, 1), 64));
  FASTMOE_RETURN_IF_ERROR(encode(&args.b_map, down_view(shape, p.down), G::kBBoxRows));
  args.k_size = static_cast<int>(shape.intermediate);
  args.n_size = static_cast<int>(shape.hidden);
  args.n_tiles = static_cast<int>(ceil_div(shape.hidden, G::kN));
  args.epilogue = {p.rows, p.down_bias, args.n_size};
  return launch<G>(args, shape.slots(), stream);
}

template <typename T>
cudaError_t launch_down(const DownParams& p, cudaStream_t stream) {
  if (configure(Product::down, p.shape).tiling == Tiling::narrow) {
    return run_down<Gemm<T, Load::rows, Load::rows, false, 64, 1, false, 1, RowsEpilogue>>(p, stream);
  }
  return run_down<Gemm<T, Load::rows, Load::rows, true, 256, 1, false, 2, RowsEpilogue>>(p, stream);
}

template <class G>
cudaError_t run_input_grad(const InputGradParams& p, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  const int halves = is_gated(shape.activation) ? 2 : 1;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.a_map, slots_view(shape, p.grad_pre, shape.intermediate, halves), 64));
  FASTMOE_RETURN_IF_ERROR(encode(&args.b_map, gate_up_view(shape, p.gate_up), 64));
  args.k_size = static_cast<int>(shape.intermediate);
  args.k_halves = halves;
  args.n_size = static_cast<int>(shape.hidden);
  args.n_tiles = static_cast<int>(ceil_div(shape.hidden, G::kN));
  args.epilogue = {p.grad_rows, nullptr, args.n_size};
  return launch<G>(args, shape.slots(), stream);
}

template <typename T>
cudaError_t launch_input_grad(const InputGradParams& p, cudaStream_t stream) {
  return run_input_grad<Gemm<T, Load::rows, Load::columns, true, 256, 1, false, 2, RowsEpilogue>>(p, stream);
}

}  // namespace fastmoe_cpp::cuda::sm90
