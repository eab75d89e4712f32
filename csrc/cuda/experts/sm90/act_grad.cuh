// act_grad: gathered rows of grad_output times down, the activation's gradient in the epilogue.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

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

template <class G>
cudaError_t run_act_grad(const ActGradParams& p, float* partial, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.b_map, down_view(shape, p.down), 64));
  FASTMOE_RETURN_IF_ERROR(
      encode(&args.input_map,
             slots_view(shape, p.pre_activation, shape.intermediate, is_gated(shape.activation) ? 2 : 1), 64));
  args.gathered = p.grad_output;
  args.gathered_columns = shape.hidden;
  args.k_size = static_cast<int>(shape.hidden);
  args.n_size = static_cast<int>(shape.intermediate);
  args.n_tiles = static_cast<int>(ceil_div(shape.intermediate, G::kN));
  args.epilogue = {p.grad_pre,
                   p.scaled_act,
                   partial,
                   shape.weight_on_input ? nullptr : p.plan.weights,
                   shape.slots(),
                   args.n_size,
                   shape.activation,
                   static_cast<float>(shape.alpha),
                   static_cast<float>(shape.limit)};
  return launch<G>(args, shape.slots(), stream);
}

template <typename T, bool kGated, bool kSwiGLU>
cudaError_t tile_act_grad(const ActGradParams& p, float* partial, cudaStream_t stream) {
  using Epilogue = ActGradEpilogue<kGated, kSwiGLU>;
  return run_act_grad<Gemm<T, Load::gathered_rows, Load::columns, true, 256, 1, false, 2, Epilogue>>(p, partial,
                                                                                                     stream);
}

template <typename T>
cudaError_t launch_act_grad(const ActGradParams& p, float* partial, cudaStream_t stream) {
  if (p.shape.activation == Activation::SwiGLU) return tile_act_grad<T, true, true>(p, partial, stream);
  return is_gated(p.shape.activation) ? tile_act_grad<T, true, false>(p, partial, stream)
                                      : tile_act_grad<T, false, false>(p, partial, stream);
}

}  // namespace fastmoe_cpp::cuda::sm90
