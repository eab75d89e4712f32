// act_grad: gathered rows of grad_output times down, the activation's gradient in the epilogue.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

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
