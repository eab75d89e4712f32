// The weight gradients: contraction over an expert's slots, A gathered from the tokens, B in slot order. H runs along M:
// dW_down [E, H, I] is stored as it is, dW_gate_up [E, up_rows, H] transposed.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

// grad[e] = accumulators, or kTransposes theirs, rounded. kAdds: grad is float32, and the accumulators are added to it as
// they are. They pass through shared memory, so that whole lines are read and written.
template <bool kTransposes, bool kAdds>
struct WeightGradEpilogue {
  static constexpr bool kHolds = false;
  static constexpr int kInputHalves = 0;
  struct Params {
    void* grad;  // [E, rows, columns]
    int rows, columns;
    bool interleaved;  // the weight's rows alternate between two halves, those of the product do not
  };

  // A column of the expert's weight, by rows of the product. What it needs is opaque, or the compiler computes it again at
  // every row.
  template <typename Element>
  struct Column {
    Element* first;
    uint32_t row_bytes;
    int half_rows, scale, back;

    __device__ __forceinline__ Column(const Params& params, int expert, int column)
        : first(static_cast<Element*>(params.grad) + static_cast<int64_t>(expert) * params.rows * params.columns +
                column),
          row_bytes(static_cast<uint32_t>(params.columns) * sizeof(Element)),
          half_rows(params.rows / 2),
          scale(params.interleaved ? 2 : 1),
          back(params.interleaved ? params.rows - 1 : 0) {
      asm("" : "+r"(row_bytes), "+r"(half_rows), "+r"(scale), "+r"(back));
    }
    __device__ __forceinline__ Element* at(int row) const {
      const uint32_t weight_row = row * scale - (row < half_rows ? 0 : back);
      return reinterpret_cast<Element*>(reinterpret_cast<char*>(first) + static_cast<uint64_t>(weight_row) * row_bytes);
    }
  };

  using Ahead = Nothing;
  template <class G>
  __device__ static Ahead fetch(const Arguments<G>&, const Tile&, int) {
    return {};
  }

  template <class G>
  __device__ static void store(const Arguments<G>& args, const Tile& tile, int first_row,
                               float (&accumulators)[G::kN / 2], const Ahead&, const Ring& ring,
                               Position<G::kStages>&) {
    const int m = tile.m * G::kM + first_row, n = tile.n * G::kN;  // the warpgroup's 64 x kN begin here
    const uint32_t staging = ring.staging + first_row / 64 * G::kStagingBytes;
    const int barrier = kTransformBarrier + first_row / 64;
    if constexpr (kAdds) {
      if (tile.rows == 0) return;
      if constexpr (kTransposes) {
        add_transposed<G>(args.epilogue, tile.expert, m, n, accumulators, staging, barrier);
      } else {
        add_rows<G>(args.epilogue, tile.expert, m, n, accumulators, staging);
      }
    } else if constexpr (kTransposes) {
      store_transposed<G>(args.epilogue, tile.expert, m, n, accumulators, staging, barrier);
    } else {
      store_rows<G>(args.epilogue, tile.expert, m, n, accumulators, staging);
    }
  }

 private:
  // Matrix i of four is block i / 2 of two, row half i % 2.
  template <class G>
  __device__ static void stage_blocks(const float (&accumulators)[G::kN / 2], int block, uint32_t address) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = pack<typename G::T>(accumulators[4 * block + 2 * i], accumulators[4 * block + 2 * i + 1]);
    ptx::store_matrices<kTransposes>(address, v);
  }

  // A warp has 16 rows, 64 columns of them in shared memory: 128 bytes a row, its 16-byte chunks c at c ^ row % 8.
  template <class G>
  __device__ static void store_rows(const Params& params, int expert, int m, int n,
                                    const float (&accumulators)[G::kN / 2], uint32_t staging) {
    using T = typename G::T;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, chunk = lane & 7;
    const uint32_t rows_at = staging + warp * 2048;
    const int to_row = lane & 15;
    const int first = m + warp * 16 + (lane >> 3);  // a lane reads every fourth row from here
    T* const out = Column<T>(params, expert, n + chunk * 8).at(first);
#pragma unroll
    for (int step = 0; step < G::kN / 64; ++step) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        stage_blocks<G>(accumulators, 8 * step + 2 * i,
                        rows_at + to_row * 128 + (((2 * i + (lane >> 4)) ^ (to_row & 7)) << 4));
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (lane >> 3) + 4 * i;
        uint32_t v[4];
        ptx::load_shared_16(v, rows_at + row * 128 + ((chunk ^ (row & 7)) << 4));
        if (first + 4 * i < params.rows && n + step * 64 + chunk * 8 < params.columns)
          store_16(out + static_cast<int64_t>(4 * i) * params.columns + step * 64, v);
      }
    }
  }

  // The warpgroup has 64 of the weight's columns: 32 rows of 128 bytes in shared memory, chunks as above, in one buffer
  // while the other is read.
  template <class G>
  __device__ static void store_transposed(const Params& params, int expert, int m, int n,
                                          const float (&accumulators)[G::kN / 2], uint32_t staging, int barrier) {
    using T = typename G::T;
    const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
    const int to_row = (lane >> 4) * 8 + (lane & 7), to_chunk = 2 * warp + ((lane >> 3) & 1);
    const uint32_t to = staging + to_row * 128 + ((to_chunk ^ (lane & 7)) << 4);
    const int row = thread >> 3, chunk = thread & 7, column = m + chunk * 8;
    const uint32_t from = staging + row * 128 + ((chunk ^ (row & 7)) << 4);
    const Column<T> out(params, expert, column);
    const int rows = column < params.columns ? params.rows : 0;
#pragma unroll
    for (int step = 0; step < G::kN / 32; ++step) {
      const uint32_t buffer = step % 2 * 4096;
#pragma unroll
      for (int i = 0; i < 2; ++i) stage_blocks<G>(accumulators, 4 * step + 2 * i, to + buffer + i * 2048);
      ptx::named_barrier_sync(barrier, 128);
      uint32_t v[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::load_shared_16(v[i], from + buffer + i * 2048);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int out_row = n + step * 32 + i * 16 + row;
        if (out_row < rows) store_16(out.at(out_row), v[i]);
      }
    }
  }

  __device__ static float4 sum_of(float4 a, const float4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

  // A warp has 16 rows, 32 columns of them in shared memory: 128 bytes a row, its groups of 8 columns g at g ^ row % 4.
  template <class G>
  __device__ static void add_rows(const Params& params, int expert, int m, int n,
                                  const float (&accumulators)[G::kN / 2], uint32_t staging) {
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const uint32_t warp_at = staging + warp * 2048;
    const int to_row = lane >> 2;  // and the eighth after it
    const uint32_t to = warp_at + to_row * 128 + (lane & 3) * 8;
    const int row = lane >> 3, piece = lane & 7, first = m + warp * 16 + row;
    const uint32_t from = warp_at + row * 128 + (((piece >> 1) ^ row) << 5) + (piece & 1) * 16;
    float* const out = Column<float>(params, expert, n + piece * 4).at(first);
#pragma unroll
    for (int step = 0; step < G::kN / 32; ++step) {
      float4 sums[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + 4 * i < params.rows && n + step * 32 + piece * 4 < params.columns)
          sums[i] = *reinterpret_cast<const float4*>(out + static_cast<int64_t>(4 * i) * params.columns + step * 32);
      }
      __syncwarp();
#pragma unroll
      for (int block = 0; block < 4; ++block) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 4 * (4 * step + block) + 2 * h;
          ptx::store_shared(to + h * 1024 + ((block ^ (to_row & 3)) << 5), accumulators[i], accumulators[i + 1]);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 sum = sum_of(ptx::load_shared_float4(from + i * 512), sums[i]);
        if (first + 4 * i < params.rows && n + step * 32 + piece * 4 < params.columns)
          *reinterpret_cast<float4*>(out + static_cast<int64_t>(4 * i) * params.columns + step * 32) = sum;
      }
    }
  }

  // The warpgroup has 64 of the weight's columns: 16 rows of 256 bytes in shared memory, its groups of 8 columns g at
  // g ^ row / 2 % 4, in one buffer while the other is read.
  template <class G>
  __device__ static void add_transposed(const Params& params, int expert, int m, int n,
                                        const float (&accumulators)[G::kN / 2], uint32_t staging, int barrier) {
    const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5, quad = lane & 3;
    const uint32_t to = staging + quad * 512 + (lane >> 2) * 4;
    const int row = thread >> 4, piece = thread & 15, column = m + piece * 4;
    const uint32_t from = staging + row * 256 + (((piece >> 1) ^ (row >> 1 & 3)) << 5) + (piece & 1) * 16;
    const Column<float> out(params, expert, column);
    const int rows = column < params.columns ? params.rows - n - row : 0;
#pragma unroll
    for (int group = 0; group < G::kN / 16; group += 4) {
      float4 sums[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = group * 16 + i * 8;
        if (r < rows) sums[i] = *reinterpret_cast<const float4*>(out.at(n + row + r));
      }
#pragma unroll
      for (int step = group; step < group + 4; ++step) {
        const uint32_t buffer = step % 2 * 4096;
#pragma unroll
        for (int block = 0; block < 2; ++block) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ptx::store_shared(to + buffer + (8 * block + i % 2) * 256 + (((2 * warp + i / 2) ^ quad) << 5),
                              accumulators[4 * (2 * step + block) + i]);
          }
        }
        ptx::named_barrier_sync(barrier, 128);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int r = step * 16 + i * 8;
          const float4 sum = sum_of(ptx::load_shared_float4(from + buffer + i * 2048), sums[(step - group) * 2 + i]);
          if (r < rows) *reinterpret_cast<float4*>(out.at(n + row + r)) = sum;
        }
      }
    }
  }
};

// That of gate_up, kTransposes, carries the sum of grad_rows.
template <typename T, bool kTransposes, bool kAdds>
using WeightGrad = Gemm<T, Load::gathered_columns, Load::columns, true, 256, 1, true, 2,
                        WeightGradEpilogue<kTransposes, kAdds>, kTransposes>;

// `gathered` [T, H]; `factor` [P, columns].
template <class G>
cudaError_t run_weight_grad(const WeightGradParams& p, const void* gathered, const void* factor, int64_t columns,
                            const typename G::Epilogue::Params& epilogue, const float* slot_scale,
                            cudaStream_t stream) {
  if (p.claimed == nullptr) return cudaErrorInvalidValue;
  const ExpertShape& shape = p.shape;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.b_map, slots_view(shape, factor, columns, 1), 64));
  args.gathered = gathered;
  args.gathered_columns = shape.hidden;
  args.slot_scale = slot_scale;
  args.claimed = p.claimed;
  args.n_size = static_cast<int>(columns);
  args.m_tiles = static_cast<int>(ceil_div(shape.hidden, G::kM));
  args.n_tiles = static_cast<int>(ceil_div(columns, G::kN));
  args.epilogue = epilogue;
  if constexpr (G::kCarriesSum) {
    args.sum = {p.grad_rows,
                p.grad_hidden,
                p.plan.token_slot,
                slot_scale,
                static_cast<uint32_t>(shape.tokens),
                static_cast<uint32_t>(shape.hidden),
                static_cast<uint32_t>(shape.top_k),
                p.sum_blocks};
  }
  return launch<G>(args, shape.slots(), stream);
}

template <typename T>
cudaError_t launch_gate_up_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  const int rows = static_cast<int>(shape.up_rows()), columns = static_cast<int>(shape.hidden);
  const bool interleaved = is_gated(shape.activation) && shape.interleaved;
  const float* const scale = shape.weight_on_input ? p.plan.weights : nullptr;
  const auto run = [&](auto adds) {
    return run_weight_grad<WeightGrad<T, true, decltype(adds)::value>>(
        p, p.right, p.left, rows, {p.grad, rows, columns, interleaved}, scale, stream);
  };
  return p.adds ? run(std::true_type{}) : run(std::false_type{});
}

template <typename T>
cudaError_t launch_down_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  const int rows = static_cast<int>(shape.hidden), columns = static_cast<int>(shape.intermediate);
  const auto run = [&](auto adds) {
    return run_weight_grad<WeightGrad<T, false, decltype(adds)::value>>(
        p, p.left, p.right, columns, {p.grad, rows, columns, false}, nullptr, stream);
  };
  return p.adds ? run(std::true_type{}) : run(std::false_type{});
}

}  // namespace fastmoe_cpp::cuda::sm90
