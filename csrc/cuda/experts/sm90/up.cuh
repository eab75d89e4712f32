// up: gathered rows of x times gate_up, activation in the epilogue.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

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
