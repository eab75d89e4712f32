// Description -> configuration -> launch, for the products of experts.h and the grouped linear layer.
#include "portable.h"

#include <initializer_list>

#include "../../device.cuh"
#include "launch.h"
#include "rows.h"

namespace fastmoe_cpp::cuda::portable {

#ifdef FASTMOE_PORTABLE_TUNE
int forced_tiling = -1;
#endif

namespace {

cudaError_t this_device(Device& out) {
  int device = 0, bytes = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&out.multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return e;
  if (const cudaError_t e = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return e;
  out.shared_bytes = bytes;
  return cudaSuccess;
}

template <Kind kKind>
cudaError_t run(const Product& product, const Arguments& args, cudaStream_t stream) {
  Device device;
  if (const cudaError_t e = this_device(device)) return e;
#ifdef FASTMOE_PORTABLE_TUNE
  const Configuration c =
      configure(product, device, product.vectorised && product.dtype >= DType::bf16 ? forced_tiling : -1);
#else
  const Configuration c = configure(product, device);
#endif
  if (c.grid == 0) return cudaSuccess;
  // A kernel counts tiles, rounded up to whole rounds of the grid, in an int.
  if (c.tiles + 2 * c.grid > INT32_MAX) return cudaErrorInvalidValue;
  return with_dtype(product.dtype,
                    [&](auto zero) { return launch<kKind, decltype(zero)>(c, product.vectorised, args, stream); });
}

bool all_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (!aligned_to(p, 16)) return false;
  return true;
}

Arguments arguments_of(const ExpertShape& shape, const Plan& plan) {
  Arguments a{};
  a.expert_offsets = plan.expert_offsets;
  a.experts = shape.experts;
  a.slot_index = plan.slot_index;
  a.top_k = Divider(static_cast<uint32_t>(shape.top_k));
  a.slots = shape.slots();
  a.gated = is_gated(shape.activation);
  a.activation = shape.activation;
  a.alpha = shape.alpha;
  a.limit = shape.limit;
  return a;
}

int alternate(const ExpertShape& shape) {
  return shape.interleaved && is_gated(shape.activation) ? static_cast<int>(shape.intermediate) : 0;
}

cudaError_t bias_grad(const WeightGradParams& p, int64_t columns, int alternate, bool gather, bool weighted,
                      cudaStream_t stream) {
  const ColumnSums sums{p.shape.dtype,
                        p.plan.expert_offsets,
                        p.plan.slot_index,
                        p.shape.experts,
                        static_cast<int>(columns),
                        p.shape.top_k,
                        alternate,
                        gather,
                        p.left,
                        weighted ? p.plan.weights : nullptr,
                        p.grad_bias};
  return column_sums(sums, stream);
}

int64_t dot_blocks(const ExpertShape& shape) { return ceil_div(shape.intermediate, 64); }

}  // namespace

bool vectorised(const ExpertShape& shape) { return shape.hidden % 8 == 0 && shape.intermediate % 8 == 0; }

Product product_of(Launch launch, const ExpertShape& s, bool vectorised) {
  const bool gated = is_gated(s.activation);
  switch (launch) {
    case Launch::up: return {Kind::up, s.dtype, s.slots(), s.experts, 0, s.intermediate, s.hidden, gated, vectorised};
    case Launch::down:
      return {Kind::linear, s.dtype, s.slots(), s.experts, 0, s.hidden, s.intermediate, false, vectorised};
    case Launch::act_grad:
      return {Kind::act_grad, s.dtype, s.slots(), s.experts, 0, s.intermediate, s.hidden, gated, vectorised};
    case Launch::input_grad:
      return {Kind::linear_grad, s.dtype, s.slots(), s.experts, 0, s.hidden, s.up_rows(), false, vectorised};
    case Launch::gate_up_weight_grad:
      return {Kind::weight_grad, s.dtype, s.slots(), s.experts, s.up_rows(), s.hidden, 0, false, vectorised};
    default: return {Kind::weight_grad, s.dtype, s.slots(), s.experts, s.hidden, s.intermediate, 0, false, vectorised};
  }
}

cudaError_t up(const UpParams& p, cudaStream_t stream) {
  const ExpertShape& s = p.shape;
  Arguments a = arguments_of(s, p.plan);
  a.gather_a = true;
  a.a = p.x;
  a.b = p.gate_up;
  a.a_stride = a.b_stride = a.contraction = static_cast<int>(s.hidden);
  a.b_expert = s.up_rows() * s.hidden;
  a.columns = static_cast<int>(s.intermediate);
  a.alternate = alternate(s);
  a.weights = s.weight_on_input ? p.plan.weights : nullptr;
  a.bias = p.gate_up_bias;
  a.pre = p.pre_activation;
  a.out = p.act;
  if (!a.pre && !a.out) return cudaSuccess;
  const bool wide = vectorised(s) && all_aligned({a.a, a.b, a.bias, a.pre, a.out});
  return run<Kind::up>(product_of(Launch::up, s, wide), a, stream);
}

cudaError_t down(const DownParams& p, cudaStream_t stream) {
  const ExpertShape& s = p.shape;
  Arguments a = arguments_of(s, p.plan);
  a.a = p.act;
  a.b = p.down;
  a.a_stride = a.b_stride = a.contraction = static_cast<int>(s.intermediate);
  a.b_expert = s.hidden * s.intermediate;
  a.columns = static_cast<int>(s.hidden);
  a.bias = p.down_bias;
  a.out = p.rows;
  const bool wide = vectorised(s) && all_aligned({a.a, a.b, a.bias, a.out});
  return run<Kind::linear>(product_of(Launch::down, s, wide), a, stream);
}

int64_t act_grad_scratch_bytes(const ActGradParams& p) {
  if (!p.grad_weight || (dot_blocks(p.shape) == 1 && !p.down_bias)) return 0;
  return dot_blocks(p.shape) * p.shape.slots() * (p.shape.dtype == DType::f64 ? 8 : 4);
}

cudaError_t act_grad(const ActGradParams& p, void* scratch, cudaStream_t stream) {
  const ExpertShape& s = p.shape;
  Arguments a = arguments_of(s, p.plan);
  a.gather_a = true;
  a.a = p.grad_output;
  a.b = p.down;
  a.a_stride = a.contraction = static_cast<int>(s.hidden);
  a.b_stride = a.columns = static_cast<int>(s.intermediate);
  a.b_expert = s.hidden * s.intermediate;
  a.weights = s.weight_on_input ? nullptr : p.plan.weights;
  a.pre = const_cast<void*>(p.pre_activation);
  a.grad_pre = p.grad_pre;
  a.out = p.scaled_act;
  const bool in_scratch = act_grad_scratch_bytes(p) > 0;
  a.partial_dot = in_scratch ? scratch : p.grad_weight;
  if (!a.grad_pre && !a.out && !a.partial_dot) return cudaSuccess;
  const bool wide = vectorised(s) && all_aligned({a.a, a.b, a.pre, a.grad_pre, a.out});
  if (const cudaError_t e = run<Kind::act_grad>(product_of(Launch::act_grad, s, wide), a, stream)) return e;
  if (!in_scratch) return cudaSuccess;
  const SlotDots dots{s.dtype,
                      p.plan.expert_offsets,
                      p.plan.slot_index,
                      s.experts,
                      s.top_k,
                      static_cast<int>(s.hidden),
                      static_cast<int>(dot_blocks(s)),
                      s.slots(),
                      scratch,
                      p.grad_output,
                      p.down_bias,
                      p.grad_weight};
  return s.slots() ? slot_dots(dots, stream) : cudaSuccess;
}

cudaError_t act_grad(const ActGradParams& p, cudaStream_t stream) {
  void* scratch = nullptr;
  const int64_t bytes = act_grad_scratch_bytes(p);
  if (bytes)
    if (const cudaError_t e = cudaMallocAsync(&scratch, bytes, stream)) return e;
  const cudaError_t result = act_grad(p, scratch, stream);
  if (scratch)
    if (const cudaError_t e = cudaFreeAsync(scratch, stream)) return e;
  return result;
}

cudaError_t input_grad(const InputGradParams& p, cudaStream_t stream) {
  const ExpertShape& s = p.shape;
  Arguments a = arguments_of(s, p.plan);
  a.a = p.grad_pre;
  a.b = p.gate_up;
  a.a_stride = a.contraction = static_cast<int>(s.up_rows());
  a.b_stride = a.columns = static_cast<int>(s.hidden);
  a.b_expert = s.up_rows() * s.hidden;
  a.alternate = alternate(s);
  a.out = p.grad_rows;
  const bool wide = vectorised(s) && all_aligned({a.a, a.b, a.out});
  return run<Kind::linear_grad>(product_of(Launch::input_grad, s, wide), a, stream);
}

cudaError_t gate_up_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  const ExpertShape& s = p.shape;
  Arguments a = arguments_of(s, p.plan);
  a.gather_b = true;
  a.a = p.left;
  a.b = p.right;
  a.a_stride = a.rows = static_cast<int>(s.up_rows());
  a.b_stride = a.columns = static_cast<int>(s.hidden);
  a.alternate = alternate(s);
  a.weights = s.weight_on_input ? p.plan.weights : nullptr;
  a.out = p.grad;
  const bool wide = vectorised(s) && all_aligned({a.a, a.b, a.out});
  if (p.grad)
    if (const cudaError_t e = run<Kind::weight_grad>(product_of(Launch::gate_up_weight_grad, s, wide), a, stream))
      return e;
  if (!p.grad_bias) return cudaSuccess;
  return bias_grad(p, s.up_rows(), alternate(s), false, false, stream);
}

cudaError_t down_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  const ExpertShape& s = p.shape;
  Arguments a = arguments_of(s, p.plan);
  a.gather_a = true;
  a.a = p.left;
  a.b = p.right;
  a.a_stride = a.rows = static_cast<int>(s.hidden);
  a.b_stride = a.columns = static_cast<int>(s.intermediate);
  a.out = p.grad;
  const bool wide = vectorised(s) && all_aligned({a.a, a.b, a.out});
  if (p.grad)
    if (const cudaError_t e = run<Kind::weight_grad>(product_of(Launch::down_weight_grad, s, wide), a, stream))
      return e;
  if (!p.grad_bias) return cudaSuccess;
  return bias_grad(p, s.hidden, 0, true, !s.weight_on_input, stream);
}

namespace {

Arguments arguments_of(const GroupedLinear& g) {
  Arguments a{};
  a.expert_offsets = g.expert_offsets;
  a.experts = g.experts;
  a.top_k = Divider(1);
  a.slots = g.slots;
  return a;
}

bool vectorised(const GroupedLinear& g) { return g.in % 8 == 0 && g.out % 8 == 0; }

}  // namespace

cudaError_t grouped_linear(const GroupedLinear& g, const void* rows, const void* weight, const void* bias, void* out,
                           cudaStream_t stream) {
  Arguments a = arguments_of(g);
  a.a = rows;
  a.b = weight;
  a.a_stride = a.b_stride = a.contraction = static_cast<int>(g.in);
  a.b_expert = g.in * g.out;
  a.columns = static_cast<int>(g.out);
  a.bias = bias;
  a.out = out;
  const bool wide = vectorised(g) && all_aligned({rows, weight, bias, out});
  const Product product{Kind::linear, g.dtype, g.slots, g.experts, 0, g.out, g.in, false, wide};
  if (!g.slots) return cudaSuccess;
  if (const cudaError_t e = run<Kind::linear>(product, a, stream)) return e;
  return zero_tail(g.dtype, out, g.expert_offsets, g.experts, g.slots, g.out, stream);
}

cudaError_t grouped_linear_input_grad(const GroupedLinear& g, const void* grad_output, const void* weight,
                                      void* grad_rows, cudaStream_t stream) {
  Arguments a = arguments_of(g);
  a.a = grad_output;
  a.b = weight;
  a.a_stride = a.contraction = static_cast<int>(g.out);
  a.b_stride = a.columns = static_cast<int>(g.in);
  a.b_expert = g.in * g.out;
  a.out = grad_rows;
  const bool wide = vectorised(g) && all_aligned({grad_output, weight, grad_rows});
  const Product product{Kind::linear_grad, g.dtype, g.slots, g.experts, 0, g.in, g.out, false, wide};
  if (!g.slots) return cudaSuccess;
  if (const cudaError_t e = run<Kind::linear_grad>(product, a, stream)) return e;
  return zero_tail(g.dtype, grad_rows, g.expert_offsets, g.experts, g.slots, g.in, stream);
}

cudaError_t grouped_linear_weight_grad(const GroupedLinear& g, const void* grad_output, const void* rows,
                                       void* grad_weight, void* grad_bias, cudaStream_t stream) {
  Arguments a = arguments_of(g);
  a.a = grad_output;
  a.b = rows;
  a.a_stride = a.rows = static_cast<int>(g.out);
  a.b_stride = a.columns = static_cast<int>(g.in);
  a.out = grad_weight;
  const bool wide = vectorised(g) && all_aligned({grad_output, rows, grad_weight});
  const Product product{Kind::weight_grad, g.dtype, g.slots, g.experts, g.out, g.in, 0, false, wide};
  if (grad_weight)
    if (const cudaError_t e = run<Kind::weight_grad>(product, a, stream)) return e;
  if (!grad_bias) return cudaSuccess;
  return column_sums({g.dtype, g.expert_offsets, nullptr, g.experts, static_cast<int>(g.out), 1, 0, false, grad_output,
                      nullptr, grad_bias},
                     stream);
}

}  // namespace fastmoe_cpp::cuda::portable
