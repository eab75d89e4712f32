// The two launches: checks that need no device, and the kernels' arguments.
#include "../../device.cuh"
#include "launch.h"

namespace fastmoe_cpp::cuda::gemv {

namespace {

Arguments arguments_of(const ExpertShape& shape, const Plan& plan) {
  Arguments args{};
  args.slot_index = plan.slot_index;
  args.expert_offsets = plan.expert_offsets;
  args.experts = shape.experts;
  args.top_k = shape.top_k;
  args.activation = shape.activation;
  args.alpha = static_cast<float>(shape.alpha);
  args.limit = static_cast<float>(shape.limit);
  return args;
}

Arguments arguments_of_down(const DownParams& p, bool follows_up) {
  Arguments args = arguments_of(p.shape, p.plan);
  args.reads_ahead = follows_up;
  args.rows = p.act;
  args.weight = p.down;
  args.bias = p.down_bias;
  args.k = static_cast<int>(p.shape.intermediate);
  args.columns = static_cast<int>(p.shape.hidden);
  return args;
}

}  // namespace

cudaError_t up(const UpParams& p, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  if (!supports(shape)) return cudaErrorInvalidValue;
  if (shape.slots() == 0 || (p.pre_activation == nullptr && p.act == nullptr)) return cudaSuccess;
  Arguments args = arguments_of(shape, p.plan);
  args.rows = p.x;
  args.weight = p.gate_up;
  args.bias = p.gate_up_bias;
  args.k = static_cast<int>(shape.hidden);
  args.columns = static_cast<int>(shape.intermediate);
  args.interleaved = shape.interleaved && is_gated(shape.activation);
  args.scale = shape.weight_on_input ? p.plan.weights : nullptr;
  args.pre = p.pre_activation;
  args.out = p.act;
  return shape.dtype == DType::f16 ? launch_up<__half>(shape, args, stream)
                                   : launch_up<__nv_bfloat16>(shape, args, stream);
}

cudaError_t down(const DownParams& p, bool follows_up, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  if (!supports(shape)) return cudaErrorInvalidValue;
  if (shape.slots() == 0) return cudaSuccess;
  Arguments args = arguments_of_down(p, follows_up);
  args.out = p.rows;
  return shape.dtype == DType::f16 ? launch_down<__half>(shape, args, stream)
                                   : launch_down<__nv_bfloat16>(shape, args, stream);
}

cudaError_t combined_down(const DownParams& p, bool weighted, void* out, bool follows_up, cudaStream_t stream) {
  const ExpertShape& shape = p.shape;
  if (!combines(shape)) return cudaErrorInvalidValue;
  Arguments args = arguments_of_down(p, follows_up);
  args.scale = weighted ? p.plan.weights : nullptr;
  args.out = out;
  args.token_slot = p.plan.token_slot;
  return shape.dtype == DType::f16 ? launch_combined_down<__half>(shape, args, stream)
                                   : launch_combined_down<__nv_bfloat16>(shape, args, stream);
}

}  // namespace fastmoe_cpp::cuda::gemv
