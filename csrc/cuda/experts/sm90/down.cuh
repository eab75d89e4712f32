// down: act times down.T, and input_grad: grad_pre times gate_up; rows of slots in, rows of slots out.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

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
