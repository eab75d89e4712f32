// The grouped expert GEMMs as five launches. No torch here: pointers, sizes, a stream.
// Every path (portable, sm90) offers the same five functions over the same parameters, so that one can replace another.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "../../activation.h"

namespace fastmoe_cpp::cuda {

enum class DType : int { f64, f32, bf16, f16 };

// Shapes as in library.cpp. Pointers are to contiguous rows of `dtype` unless a comment says otherwise.
struct ExpertShape {
  DType dtype;
  int64_t tokens, hidden, intermediate;  // T, H, I
  int experts, top_k;                    // E, K
  Activation activation;
  double alpha, limit;   // ClampedSwiGLU only
  bool interleaved;      // gate and up rows alternate in gate_up_proj and its bias (never in pre_activation)
  bool weight_on_input;  // the routing weight scales the up projection's result instead of the down projection's
  int64_t plan_slots;    // P
  int64_t slots() const { return plan_slots; }
  int64_t up_rows() const { return is_gated(activation) ? 2 * intermediate : intermediate; }
};

struct Plan {
  const int32_t* slot_index;      // [P]
  const int32_t* token_slot;      // [T, K]
  const int32_t* expert_offsets;  // [E + 1]
  const float* weights;           // [T, K]; double where dtype is f64
};

// pre_activation[s] = (x[token(s)] @ gate_up[e].T) * (weight_on_input ? w(s) : 1) + bias[e];  act[s] = f(pre_activation[s])
struct UpParams {
  ExpertShape shape;
  Plan plan;
  const void *x, *gate_up, *gate_up_bias;  // [T, H], [E, up_rows, H], [E, up_rows] or null
  void *pre_activation, *act;              // [P, up_rows] or null, [P, I] or null
};

// rows[s] = act[s] @ down[e].T + bias[e]
struct DownParams {
  ExpertShape shape;
  Plan plan;
  const void *act, *down, *down_bias;  // [P, I], [E, H, I], [E, H] or null
  void* rows;                          // [P, H]
};

// With g = grad_output[token(s)], w = weight_on_input ? 1 : w(s), A = f(pre_activation[s]), dA = g @ down[e]:
//   grad_pre[s] = f'(pre_activation[s]) * w * dA;  scaled_act[s] = w * A;  grad_weight[s] = <dA, A> (+ <g, down_bias[e]>)
struct ActGradParams {
  ExpertShape shape;
  Plan plan;
  const void *grad_output, *down, *down_bias, *pre_activation;
  void *grad_pre, *scaled_act;  // [P, up_rows] (gate half, then up half), [P, I]; null where not wanted
  float* grad_weight;           // [P] by slot, double where dtype is f64; null where not wanted
};

// grad_rows[s] = grad_pre[s] @ gate_up[e]   (before any routing weight)
struct InputGradParams {
  ExpertShape shape;
  Plan plan;
  const void *grad_pre, *gate_up;
  void* grad_rows;  // [P, H]
};

// gate_up: grad[e] = sum over its slots of scale(s) * outer(grad_pre[s], x[token(s)]), scale = weight_on_input ? w(s) : 1
// down:    grad[e] = sum over its slots of outer(grad_output[token(s)], scaled_act[s])
// An expert with no slot gets zeros. Bias gradients are the row sums of the left factors (down: of w(s) * grad_output).
struct WeightGradParams {
  ExpertShape shape;
  Plan plan;
  const void *left, *right;    // gate_up: grad_pre [P, up_rows], x [T, H]; down: grad_output [T, H], scaled_act [P, I]
  void *grad, *grad_bias;      // gate_up: [E, up_rows, H], [E, up_rows]; down: [E, H, I], [E, H]; null where not wanted
  bool adds = false;           // sm90: grad is float32, and the gradient is added to it (before any rounding)
  int32_t* claimed = nullptr;  // sm90: a counter, at first 0, for this launch alone; needed with grad
  // sm90, gate_up with grad: so many blocks (sum_blocks) also write grad_hidden[t] [T, H], the sum over k of
  // scale(s) * grad_rows[s], s = token_slot[t, k]: the bits of combine().
  int sum_blocks = 0;
  const void* grad_rows = nullptr;
  void* grad_hidden = nullptr;
};

#define FASTMOE_EXPERT_LAUNCHES                                           \
  cudaError_t up(const UpParams&, cudaStream_t);                          \
  cudaError_t down(const DownParams&, cudaStream_t);                      \
  cudaError_t act_grad(const ActGradParams&, cudaStream_t);               \
  cudaError_t input_grad(const InputGradParams&, cudaStream_t);           \
  cudaError_t gate_up_weight_grad(const WeightGradParams&, cudaStream_t); \
  cudaError_t down_weight_grad(const WeightGradParams&, cudaStream_t);

namespace portable {
FASTMOE_EXPERT_LAUNCHES
}
namespace sm90 {
bool supports(const ExpertShape&);  // dtype, alignment of H and I
FASTMOE_EXPERT_LAUNCHES
}  // namespace sm90
#undef FASTMOE_EXPERT_LAUNCHES

}  // namespace fastmoe_cpp::cuda
