// The weight gradients: contraction over an expert's slots, one operand gathered from the tokens, one in slot order.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

template <class G>
cudaError_t run_weight_grad(const WeightGradParams& p, Arguments<G>& args, int64_t rows, int64_t columns,
                            bool interleaved, cudaStream_t stream) {
  args.m_size = static_cast<int>(rows);
  args.n_size = static_cast<int>(columns);
  args.m_tiles = static_cast<int>(ceil_div(rows, G::kM));
  args.n_tiles = static_cast<int>(ceil_div(columns, G::kN));
  args.epilogue = {p.grad, args.m_size, args.n_size, interleaved};
  return launch<G>(args, p.shape.slots(), stream);
}

template <class G>
cudaError_t run_gate_up_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.a_map, slots_view(shape, p.left, shape.up_rows(), 1), 64));
  args.gathered = p.right;
  args.gathered_columns = shape.hidden;
  args.slot_scale = shape.weight_on_input ? p.plan.weights : nullptr;
  return run_weight_grad(p, args, shape.up_rows(), shape.hidden, is_gated(shape.activation) && shape.interleaved,
                         stream);
}

template <typename T>
cudaError_t launch_gate_up_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  constexpr Load kA = Load::columns, kB = Load::gathered_columns;
  using Epilogue = WeightGradEpilogue;
  switch (configure(Product::gate_up_weight_grad, p.shape).tiling) {
    case Tiling::wide: return run_gate_up_weight_grad<Gemm<T, kA, kB, false, 2, 192, 1, true, 2, Epilogue>>(p, stream);
    default: return run_gate_up_weight_grad<Gemm<T, kA, kB, true, 1, 256, 1, true, 2, Epilogue>>(p, stream);
  }
}

template <class G>
cudaError_t run_down_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  Arguments<G> args = arguments<G>(shape, p.plan);
  FASTMOE_RETURN_IF_ERROR(encode(&args.b_map, slots_view(shape, p.right, shape.intermediate, 1), 64));
  args.gathered = p.left;
  args.gathered_columns = shape.hidden;
  return run_weight_grad(p, args, shape.hidden, shape.intermediate, false, stream);
}

template <typename T>
cudaError_t launch_down_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  constexpr Load kA = Load::gathered_columns, kB = Load::columns;
  using Epilogue = WeightGradEpilogue;
  switch (configure(Product::down_weight_grad, p.shape).tiling) {
    case Tiling::wide: return run_down_weight_grad<Gemm<T, kA, kB, false, 2, 192, 1, true, 2, Epilogue>>(p, stream);
    default: return run_down_weight_grad<Gemm<T, kA, kB, true, 1, 256, 1, true, 2, Epilogue>>(p, stream);
  }
}

}  // namespace fastmoe_cpp::cuda::sm90
