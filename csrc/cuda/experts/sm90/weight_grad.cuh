// The weight gradients: contraction over an expert's slots, one operand gathered from the tokens, one in slot order.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

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

template <class G>
cudaError_t run_weight_grad(const WeightGradParams& p, Arguments<G>& args, int64_t rows, int64_t columns,
                            bool interleaved, cudaStream_t stream) {
  if (p.claimed == nullptr) return cudaErrorInvalidValue;
  args.claimed = p.claimed;
  args.m_size = static_cast<int>(rows);
  args.n_size = static_cast<int>(columns);
  args.m_tiles = static_cast<int>(ceil_div(rows, G::kM));
  args.n_tiles = static_cast<int>(ceil_div(columns, G::kN));
  args.epilogue = {p.grad, args.m_size, args.n_size, interleaved};
  return launch<G>(args, p.shape.slots(), stream);
}

template <typename T, bool kAdds>
cudaError_t run_gate_up_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  using G = Gemm<T, Load::columns, Load::gathered_columns, true, 256, 1, true, 2, WeightGradEpilogue<kAdds>, true>;
  const ExpertShape& shape = p.shape;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.a_map, slots_view(shape, p.left, shape.up_rows(), 1), 64));
  args.gathered = p.right;
  args.gathered_columns = shape.hidden;
  args.slot_scale = shape.weight_on_input ? p.plan.weights : nullptr;
  args.sum = {p.grad_rows,
              p.grad_hidden,
              p.plan.token_slot,
              args.slot_scale,
              static_cast<uint32_t>(shape.tokens),
              static_cast<uint32_t>(shape.hidden),
              static_cast<uint32_t>(shape.top_k),
              p.sum_blocks};
  return run_weight_grad(p, args, shape.up_rows(), shape.hidden, is_gated(shape.activation) && shape.interleaved,
                         stream);
}

template <typename T>
cudaError_t launch_gate_up_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  return p.adds ? run_gate_up_weight_grad<T, true>(p, stream) : run_gate_up_weight_grad<T, false>(p, stream);
}

template <typename T, bool kAdds>
cudaError_t run_down_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  using G = Gemm<T, Load::gathered_columns, Load::columns, true, 256, 1, true, 2, WeightGradEpilogue<kAdds>>;
  const ExpertShape& shape = p.shape;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.b_map, slots_view(shape, p.right, shape.intermediate, 1), 64));
  args.gathered = p.left;
  args.gathered_columns = shape.hidden;
  return run_weight_grad(p, args, shape.hidden, shape.intermediate, false, stream);
}

template <typename T>
cudaError_t launch_down_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  return p.adds ? run_down_weight_grad<T, true>(p, stream) : run_down_weight_grad<T, false>(p, stream);
}

}  // namespace fastmoe_cpp::cuda::sm90
