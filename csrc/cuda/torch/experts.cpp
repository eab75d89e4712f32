#include "../experts/experts.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>

#include "../combine.h"
#include "../experts/gemv/gemv.h"
#include "../experts/path.h"
#include "../experts/portable/portable.h"
#include "../experts/portable/rows.h"
#ifdef FASTMOE_SM90
#include "../experts/sm90/config.h"
#include "../experts/sm90/supports.h"
#endif
#include "launch.h"

namespace fastmoe_cpp::cuda {
namespace {

// The launches of experts.h in one path. act_grad takes its scratch memory from torch's allocator.
struct Launches {
  cudaError_t (*up)(const UpParams&, cudaStream_t);
  cudaError_t (*down)(const DownParams&, cudaStream_t);
  size_t (*act_grad_scratch_bytes)(const ActGradParams&);
  cudaError_t (*act_grad)(const ActGradParams&, void*, cudaStream_t);
  cudaError_t (*input_grad)(const InputGradParams&, cudaStream_t);
  cudaError_t (*gate_up_weight_grad)(const WeightGradParams&, cudaStream_t);
  cudaError_t (*down_weight_grad)(const WeightGradParams&, cudaStream_t);
  int (*sum_blocks)(const ExpertShape&, int multiprocessors);
  bool hopper;  // takes WeightGradParams::adds, needs its counter
};

const Launches kPortable{
    portable::up,
    portable::down,
    [](const ActGradParams& p) { return static_cast<size_t>(portable::act_grad_scratch_bytes(p)); },
    portable::act_grad,
    portable::input_grad,
    portable::gate_up_weight_grad,
    portable::down_weight_grad,
    [](const ExpertShape&, int) { return 0; },
    false};
#ifdef FASTMOE_SM90
const Launches kHopper{sm90::up,
                       sm90::down,
                       sm90::act_grad_scratch_bytes,
                       sm90::act_grad,
                       sm90::input_grad,
                       sm90::gate_up_weight_grad,
                       sm90::down_weight_grad,
                       sm90::sum_blocks,
                       true};
#endif

std::string_view wished_path() {
  const char* const wish = std::getenv("FASTMOE_CPP_PATH");
  if (wish == nullptr || *wish == '\0') return "";
  TORCH_CHECK_VALUE(std::string_view(wish) == "portable", "FASTMOE_CPP_PATH must be unset or 'portable', got '", wish,
                    "'");
  return wish;
}

// The operands of one call as the kernels take them: contiguous, each alive as long as this is.
struct Operands {
  Tensor hidden, gate_up, down, weights, gate_up_bias, down_bias;
  ExpertShape shape;
  Plan plan;

  Operands(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj, const Tensor& topk_weights,
           const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
           const OptionalTensor& up_bias, const OptionalTensor& low_bias, std::string_view activation, double alpha,
           double limit, bool interleaved, bool weight_on_input)
      : hidden(hidden_states.contiguous()),
        gate_up(gate_up_proj.contiguous()),
        down(down_proj.contiguous()),
        weights(topk_weights.contiguous()),
        gate_up_bias(contiguous_as(up_bias, hidden_states.scalar_type())),
        down_bias(contiguous_as(low_bias, hidden_states.scalar_type())) {
    shape.dtype = dtype_of(hidden);
    shape.tokens = hidden.size(0);
    shape.hidden = hidden.size(1);
    shape.intermediate = down.size(2);
    shape.experts = static_cast<int>(down.size(0));
    shape.top_k = static_cast<int>(token_slot.size(1));
    shape.activation = parse_activation(activation);
    shape.alpha = alpha;
    shape.limit = limit;
    shape.interleaved = interleaved && is_gated(shape.activation);
    shape.weight_on_input = weight_on_input;
    shape.plan_slots = slot_index.size(0);
    plan.slot_index = slot_index.const_data_ptr<int32_t>();
    plan.token_slot = token_slot.const_data_ptr<int32_t>();
    plan.expert_offsets = expert_offsets.const_data_ptr<int32_t>();
    plan.weights = static_cast<const float*>(weights.const_data_ptr());
  }

  bool aligned(std::initializer_list<const Tensor*> more = {}) const {
    const auto is_aligned = [](const Tensor* t) { return on_16_bytes(*t); };
    const std::initializer_list<const Tensor*> own = {&hidden, &gate_up, &down, &gate_up_bias, &down_bias};
    return std::all_of(own.begin(), own.end(), is_aligned) && std::all_of(more.begin(), more.end(), is_aligned);
  }

  const Launches& launches(std::initializer_list<const Tensor*> more = {}) const {
    const auto choice = choose_path(shape, capability(), aligned(more), wished_path());
#ifdef FASTMOE_SM90
    if (choice.path == Path::hopper) return kHopper;
#endif
    return kPortable;
  }

  bool takes_gemv() const { return choose_gemv(shape, capability(), aligned(), wished_path()).taken; }

  Tensor slot_rows(int64_t columns) const {
    return empty({shape.slots(), columns}, hidden.scalar_type(), hidden.device());
  }

 private:
  static int capability() {
    const auto* device = at::cuda::getCurrentDeviceProperties();
    return device->major * 10 + device->minor;
  }
};

// out[t] = sum over k of w[t, k] * rows[token_slot[t, k]]; every w is 1 where `weighted` is false.
void sum_into_tokens(const Operands& o, bool weighted, const Tensor& rows, const Tensor& out, cudaStream_t stream) {
  CombineParams p{};
  p.dtype = o.shape.dtype;
  p.tokens = o.shape.tokens;
  p.hidden = o.shape.hidden;
  p.top_k = o.shape.top_k;
  p.token_slot = o.plan.token_slot;
  p.weights = weighted ? o.plan.weights : nullptr;
  p.rows = rows.const_data_ptr();
  p.out = out.mutable_data_ptr();
  C10_CUDA_CHECK(combine(p, stream));
}

std::tuple<Tensor, Tensor> experts_forward_op(const Tensor& hidden_states, const Tensor& gate_up_proj,
                                              const Tensor& down_proj, const Tensor& topk_weights,
                                              const Tensor& slot_index, const Tensor& token_slot,
                                              const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                                              const OptionalTensor& down_bias, std::string_view activation,
                                              double activation_alpha, double activation_limit, bool interleaved,
                                              bool weight_on_input, bool keep_pre_activation) {
  check_experts_forward(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                        gate_up_bias, down_bias, activation);
  const c10::cuda::CUDAGuard guard(hidden_states.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Operands o(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                   gate_up_bias, down_bias, activation, activation_alpha, activation_limit, interleaved,
                   weight_on_input);
  const bool few = o.takes_gemv();
  const Launches& run = o.launches();
  const at::ScalarType type = o.hidden.scalar_type();
  Tensor pre = keep_pre_activation ? o.slot_rows(o.shape.up_rows()) : empty({0}, type, o.hidden.device());
  Tensor out = empty(o.hidden.sizes(), type, o.hidden.device());
  if (o.shape.tokens == 0) return {out, pre};
  if (o.shape.slots() == 0) return {out.zero_(), pre};
  const bool combined = few && gemv::combines(o.shape);
  const Tensor rows = combined ? Tensor() : o.slot_rows(o.shape.hidden);
  {
    const Tensor act = o.slot_rows(o.shape.intermediate);
    const UpParams up{o.shape,
                      o.plan,
                      o.hidden.const_data_ptr(),
                      o.gate_up.const_data_ptr(),
                      data_or_null(o.gate_up_bias),
                      keep_pre_activation ? pre.mutable_data_ptr() : nullptr,
                      act.mutable_data_ptr()};
    const DownParams down{o.shape,
                          o.plan,
                          act.const_data_ptr(),
                          o.down.const_data_ptr(),
                          data_or_null(o.down_bias),
                          combined ? nullptr : rows.mutable_data_ptr()};
    C10_CUDA_CHECK(few ? gemv::up(up, stream) : run.up(up, stream));
    C10_CUDA_CHECK(combined ? gemv::combined_down(down, !weight_on_input, out.mutable_data_ptr(), true, stream)
                   : few    ? gemv::down(down, /*follows_up=*/true, stream)
                            : run.down(down, stream));
  }
  if (!combined) sum_into_tokens(o, !weight_on_input, rows, out, stream);
  if (keep_pre_activation) {  // no launch writes the rows of nobody, and the operator returns them
    C10_CUDA_CHECK(portable::zero_tail(o.shape.dtype, pre.mutable_data_ptr(), o.plan.expert_offsets, o.shape.experts,
                                       o.shape.slots(), o.shape.up_rows(), stream));
  }
  return {out, pre};
}

// Where a projection's gradient goes: a tensor of its own, made when its kernel is launched and no sooner, or added to a
// float32 buffer, by the kernel or, where that cannot, from a tensor of its own.
class WeightGrad {
 public:
  WeightGrad(bool wanted, const Tensor& weight, const OptionalTensor& main_grad, bool can_add)
      : weight_(weight), buffer_(wanted && has(main_grad) ? *main_grad : Tensor()), wanted_(wanted) {
    adds_ = can_add && buffer_.defined() && on_16_bytes(buffer_);
  }

  bool adds() const { return adds_; }
  void* pointer() {
    if (!wanted_) return nullptr;
    if (adds_) return buffer_.mutable_data_ptr();
    if (!grad_.defined()) grad_ = at::empty(weight_.sizes(), weight_.options());
    return grad_.mutable_data_ptr();
  }
  void zero() {
    if (wanted_ && !adds_) grad_ = at::zeros(weight_.sizes(), weight_.options());
  }
  Tensor result() const {
    if (grad_.defined() && !buffer_.defined()) return grad_;
    if (grad_.defined()) buffer_.add_(grad_);
    return at::empty({0}, weight_.options());
  }

 private:
  Tensor weight_, buffer_, grad_;  // buffer_: undefined where a tensor of its own is what is wanted
  bool wanted_, adds_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward_accumulate_op(
    const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
    std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
    bool weight_on_input, std::array<bool, 6> output_mask, const OptionalTensor& gate_up_main_grad,
    const OptionalTensor& down_main_grad, const OptionalTensor& workspace) {
  check_main_grads(gate_up_proj, down_proj, gate_up_main_grad, down_main_grad);
  check_workspace(workspace, hidden_states, gate_up_proj, slot_index);
  check_experts_backward(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot,
                         expert_offsets, gate_up_bias, down_bias, pre_activation, activation);
  const c10::cuda::CUDAGuard guard(hidden_states.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Operands o(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                   gate_up_bias, down_bias, activation, activation_alpha, activation_limit, interleaved,
                   weight_on_input);
  const Tensor g = grad_output.contiguous();
  Tensor pre = has(pre_activation) ? pre_activation->contiguous() : Tensor();
  // For the pre-activation's gradient, where kernels can store it. Not while a graph is captured: its backward may be
  // replayed more often than its forward, and each time needs what forward kept.
  Tensor room;
  if (has(workspace) && on_16_bytes(*workspace) &&
      c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None)
    room = *workspace;
  const Launches& run = o.launches({&g, &pre});
  const auto [want_hidden, want_gate_up, want_down, want_weights, want_gate_up_bias, want_down_bias] = output_mask;
  const auto grad_like = [](bool wanted, at::IntArrayRef sizes, const at::TensorOptions& options) {
    return wanted ? at::empty(sizes, options) : at::empty({0}, options);
  };
  const auto options = hidden_states.options();
  const int64_t experts = o.shape.experts, up_rows = o.shape.up_rows();
  Tensor grad_hidden = grad_like(want_hidden, o.hidden.sizes(), options);
  WeightGrad grad_gate_up(want_gate_up, o.gate_up, gate_up_main_grad, run.hopper);
  WeightGrad grad_down(want_down, o.down, down_main_grad, run.hopper);
  Tensor grad_weights = grad_like(want_weights, o.weights.sizes(), o.weights.options());
  Tensor grad_gate_up_bias = grad_like(want_gate_up_bias, {experts, up_rows}, options);
  Tensor grad_down_bias = grad_like(want_down_bias, {experts, o.shape.hidden}, options);
  const auto result = [&] {
    return std::make_tuple(grad_hidden, grad_gate_up.result(), grad_down.result(), grad_weights, grad_gate_up_bias,
                           grad_down_bias);
  };
  if (o.shape.slots() == 0) {
    for (Tensor* t : {&grad_hidden, &grad_weights, &grad_gate_up_bias, &grad_down_bias}) t->zero_();
    grad_gate_up.zero();
    grad_down.zero();
    return result();
  }
  const Tensor claimed = at::zeros({run.hopper && (want_gate_up || want_down) ? 2 : 0}, options.dtype(at::kInt));
  const auto counter = [&](int i) { return claimed.numel() == 0 ? nullptr : claimed.mutable_data_ptr<int32_t>() + i; };
  const auto pointer = [](bool wanted, const Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; };

  if (!pre.defined()) {
    if (!room.defined()) room = o.slot_rows(up_rows);
    pre = room;
    const auto up = o.takes_gemv() ? gemv::up : run.up;
    C10_CUDA_CHECK(up({o.shape, o.plan, o.hidden.const_data_ptr(), o.gate_up.const_data_ptr(),
                       data_or_null(o.gate_up_bias), pre.mutable_data_ptr(), nullptr},
                      stream));
  }
  // With the weight on the input, its gradient is <x, dx of the slot>, so the slots' dx is wanted for it as well.
  const bool want_rows = want_hidden || (weight_on_input && want_weights);
  const bool want_pre = want_rows || want_gate_up || want_gate_up_bias, want_dot = want_weights && !weight_on_input;
  Tensor grad_pre;
  {
    const Tensor scaled_act = want_down ? o.slot_rows(o.shape.intermediate) : Tensor();
    // act_grad reads an element of the pre-activation where it writes the gradient's, and before: they may share memory
    if (want_pre) grad_pre = room.defined() ? room : o.slot_rows(up_rows);
    const Tensor by_slot = want_dot ? at::empty({o.shape.slots()}, o.weights.options()) : Tensor();
    if (want_pre || want_down || want_dot) {
      ActGradParams p{o.shape,
                      o.plan,
                      g.const_data_ptr(),
                      o.down.const_data_ptr(),
                      data_or_null(o.down_bias),
                      pre.const_data_ptr(),
                      pointer(want_pre, grad_pre),
                      pointer(want_down, scaled_act),
                      static_cast<float*>(pointer(want_dot, by_slot))};
      const Tensor scratch = at::empty({static_cast<int64_t>(run.act_grad_scratch_bytes(p))}, options.dtype(at::kByte));
      C10_CUDA_CHECK(run.act_grad(p, scratch.mutable_data_ptr(), stream));
    }
    if (want_dot) {
      C10_CUDA_CHECK(slots_to_pairs({o.shape.dtype, grad_weights.numel(), o.plan.token_slot, by_slot.const_data_ptr(),
                                     grad_weights.mutable_data_ptr()},
                                    stream));
    }
    if (want_down || want_down_bias) {
      C10_CUDA_CHECK(
          run.down_weight_grad({o.shape, o.plan, g.const_data_ptr(), data_or_null(scaled_act), grad_down.pointer(),
                                pointer(want_down_bias, grad_down_bias), grad_down.adds(), counter(0)},
                               stream));
    }
  }
  Tensor grad_rows;
  int sum_blocks = 0;  // of the next kernel, that sum grad_rows into grad_hidden
  if (want_rows) {
    grad_rows = o.slot_rows(o.shape.hidden);
    C10_CUDA_CHECK(run.input_grad(
        {o.shape, o.plan, grad_pre.const_data_ptr(), o.gate_up.const_data_ptr(), grad_rows.mutable_data_ptr()},
        stream));
    if (want_hidden && want_gate_up) {
      sum_blocks = run.sum_blocks(o.shape, at::cuda::getCurrentDeviceProperties()->multiProcessorCount);
    }
    if (want_hidden && sum_blocks == 0) sum_into_tokens(o, weight_on_input, grad_rows, grad_hidden, stream);
    if (weight_on_input && want_weights) {
      CombineBackwardParams p{};
      p.dtype = o.shape.dtype;
      p.tokens = o.shape.tokens;
      p.hidden = o.shape.hidden;
      p.top_k = o.shape.top_k;
      p.experts = o.shape.experts;
      p.slots = o.shape.slots();
      p.token_slot = o.plan.token_slot;
      p.expert_offsets = o.plan.expert_offsets;
      p.grad_output = o.hidden.const_data_ptr();
      p.rows = grad_rows.const_data_ptr();
      p.grad_weights = grad_weights.mutable_data_ptr();
      C10_CUDA_CHECK(combine_backward(p, stream));
    }
  }
  if (want_gate_up || want_gate_up_bias) {
    C10_CUDA_CHECK(run.gate_up_weight_grad(
        {o.shape, o.plan, grad_pre.const_data_ptr(), o.hidden.const_data_ptr(), grad_gate_up.pointer(),
         pointer(want_gate_up_bias, grad_gate_up_bias), grad_gate_up.adds(), counter(1), sum_blocks,
         data_or_null(grad_rows), pointer(sum_blocks > 0, grad_hidden)},
        stream));
  }
  return result();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward_op(
    const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
    std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
    bool weight_on_input, std::array<bool, 6> output_mask) {
  return experts_backward_accumulate_op(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, slot_index,
                                        token_slot, expert_offsets, gate_up_bias, down_bias, pre_activation, activation,
                                        activation_alpha, activation_limit, interleaved, weight_on_input, output_mask,
                                        std::nullopt, std::nullopt, std::nullopt);
}

portable::GroupedLinear describe(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets) {
  return {dtype_of(rows),
          rows.size(0),
          weight.size(2),
          weight.size(1),
          static_cast<int>(weight.size(0)),
          expert_offsets.const_data_ptr<int32_t>()};
}

Tensor grouped_linear_op(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                         const OptionalTensor& bias) {
  check_grouped_linear(rows, weight, expert_offsets, bias);
  const c10::cuda::CUDAGuard guard(rows.device());
  const Tensor x = rows.contiguous(), w = weight.contiguous(), b = contiguous_as(bias, rows.scalar_type());
  Tensor out = at::empty({x.size(0), w.size(1)}, x.options());
  if (out.numel() == 0) return out;
  C10_CUDA_CHECK(portable::grouped_linear(describe(x, w, expert_offsets), x.const_data_ptr(), w.const_data_ptr(),
                                          data_or_null(b), out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward_op(const Tensor& grad_output, const Tensor& rows,
                                                              const Tensor& weight, const Tensor& expert_offsets,
                                                              std::array<bool, 3> output_mask) {
  check_grouped_linear_backward(grad_output, rows, weight, expert_offsets);
  const c10::cuda::CUDAGuard guard(rows.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor g = grad_output.contiguous(), x = rows.contiguous(), w = weight.contiguous();
  const auto grad_like = [&](bool wanted, at::IntArrayRef sizes) {
    return wanted ? at::empty(sizes, x.options()) : at::empty({0}, x.options());
  };
  Tensor grad_rows = grad_like(output_mask[0], x.sizes()), grad_weight = grad_like(output_mask[1], w.sizes());
  Tensor grad_bias = grad_like(output_mask[2], {w.size(0), w.size(1)});
  if (g.numel() == 0 || x.numel() == 0) {
    grad_rows.zero_(), grad_weight.zero_(), grad_bias.zero_();
    if (g.numel() == 0) return {grad_rows, grad_weight, grad_bias};
  }
  const auto d = describe(x, w, expert_offsets);
  if (output_mask[0] && grad_rows.numel() > 0) {
    C10_CUDA_CHECK(portable::grouped_linear_input_grad(d, g.const_data_ptr(), w.const_data_ptr(),
                                                       grad_rows.mutable_data_ptr(), stream));
  }
  if (output_mask[1] || output_mask[2]) {
    C10_CUDA_CHECK(portable::grouped_linear_weight_grad(
        d, g.const_data_ptr(), x.const_data_ptr(), grad_weight.numel() > 0 ? grad_weight.mutable_data_ptr() : nullptr,
        output_mask[2] ? grad_bias.mutable_data_ptr() : nullptr, stream));
  }
  return {grad_rows, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastmoe_cpp::cuda

TORCH_LIBRARY_IMPL(fastmoe_cpp, CUDA, m) {
  m.impl("experts_forward", fastmoe_cpp::cuda::experts_forward_op);
  m.impl("experts_backward", fastmoe_cpp::cuda::experts_backward_op);
  m.impl("experts_backward_accumulate", fastmoe_cpp::cuda::experts_backward_accumulate_op);
  m.impl("grouped_linear", fastmoe_cpp::cuda::grouped_linear_op);
  m.impl("grouped_linear_backward", fastmoe_cpp::cuda::grouped_linear_backward_op);
}
