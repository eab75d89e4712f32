// The weight gradients: contraction over an expert's slots, one operand gathered from the tokens, one in slot order.
#pragma once
#include "launch.cuh"

namespace fastmoe_cpp::cuda::sm90 {

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
  using G = Gemm<T, Load::columns, Load::gathered_columns, true, 256, 1, true, 2, WeightGradEpilogue<kAdds>>;
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
