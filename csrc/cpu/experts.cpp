// Forward: up tasks (row block, columns of I) with the activation inside, down tasks (row block, columns of H), combine.
#include "experts.h"
#include "memory.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "combine.h"

namespace fastmoe_cpp::cpu {
namespace {

// act [P, I], and pre_activation [P, up_rows] where it is not null.
template <typename T>
void up(const Experts<T>& e, T* pre_activation, T* act) {
  using A = acc_t<T>;
  const auto columns = e.up_columns();
  run_tasks(e.blocks.size() * columns.count, [&](int64_t task, Scratch& scratch) {
    const auto& block = e.blocks[task / columns.count];
    const int64_t rows = block.rows(), range = task % columns.count;
    A* packed = scratch.get<A>(0, kBlockRows * e.hidden);
    e.pack(block, e.x, 0, e.hidden, e.weight_on_input, packed);
    for (int64_t c0 = columns.begin(range); c0 < columns.end(range); c0 += kBlockColumns) {
      const int64_t c1 = std::min(c0 + kBlockColumns, columns.end(range)), width = c1 - c0;
      Matrix<A> gate, up;
      bool in_place = false;
      if constexpr (std::is_same_v<T, A>) {
        in_place = pre_activation != nullptr;
        if (in_place) {
          gate = rows_of(pre_activation + block.begin * e.up_rows + c0, e.up_rows);
          up = gate.at(0, e.inner);
        }
      }
      if (!in_place) {
        gate = rows_of(scratch.get<A>(1, kBlockRows * 2 * kBlockColumns), 2 * width);
        up = gate.at(0, width);
      }
      e.up_block(scratch, block, c0, c1, packed, gate, up);
      A value[kBlockColumns];
      for (int64_t r = 0; r < rows; ++r) {
        const A *g = gate.data + r * gate.row_stride, *u = up.data + r * up.row_stride;
        if (pre_activation && !in_place) {
          T* kept = pre_activation + (block.begin + r) * e.up_rows + c0;
          e.loops.store(width, g, kept);
          if (e.gated) e.loops.store(width, u, kept + e.inner);
        }
        T* out = act + (block.begin + r) * e.inner + c0;
        if constexpr (std::is_same_v<T, A>) {
          e.curve.forward(width, g, u, out, e.alpha, e.limit);
        } else {
          e.curve.forward(width, g, u, value, e.alpha, e.limit);
          e.loops.store(width, value, out);
        }
      }
    }
  });
}

// rows [P, H] = act @ down.T + bias
template <typename T>
void down(const Experts<T>& e, const T* act, T* rows) {
  const auto columns = cut_columns(e.blocks.size(), e.plan.served, e.hidden, e.inner);
  run_tasks(e.blocks.size() * columns.count, [&](int64_t task, Scratch& scratch) {
    const auto& block = e.blocks[task / columns.count];
    const int64_t c0 = columns.begin(task % columns.count), c1 = columns.end(task % columns.count);
    const T* bias = e.down_bias(block.expert);
    multiply_rows(scratch, block.rows(), c1 - c0, e.inner, act + block.begin * e.inner, e.inner,
                  e.down_weight(block.expert).at(0, c0), bias ? bias + c0 : nullptr, rows + block.begin * e.hidden + c0,
                  e.hidden);
  });
}

std::tuple<Tensor, Tensor> experts_forward(const Tensor& hidden_states, const Tensor& gate_up_proj,
                                           const Tensor& down_proj, const Tensor& topk_weights,
                                           const Tensor& slot_index, const Tensor& token_slot,
                                           const Tensor& expert_offsets, const OptionalTensor& gate_up_bias,
                                           const OptionalTensor& down_bias, std::string_view activation,
                                           double activation_alpha, double activation_limit, bool interleaved,
                                           bool weight_on_input, bool keep_pre_activation) {
  check_experts_forward(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                        gate_up_bias, down_bias, activation);
  const auto options = hidden_states.options();
  Tensor output = empty(hidden_states.sizes(), options), pre_activation = at::empty({0}, options);
  with_floating(hidden_states.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Experts<T> e(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                       gate_up_bias, down_bias, activation, activation_alpha, activation_limit, interleaved,
                       weight_on_input);
    if (keep_pre_activation) {
      pre_activation = empty({e.plan.slots, e.up_rows}, options);
      // slots of nobody hold zeros, not what the memory held before
      T* tail = pre_activation.mutable_data_ptr<T>() + e.plan.served * e.up_rows;
      std::fill(tail, tail + (e.plan.slots - e.plan.served) * e.up_rows, T(0));
    }
    const Tensor act = empty({e.plan.served, e.inner}, options);
    const Tensor rows = empty({e.plan.served, e.hidden}, options);
    up(e, keep_pre_activation ? pre_activation.mutable_data_ptr<T>() : nullptr, act.mutable_data_ptr<T>());
    down(e, act.const_data_ptr<T>(), rows.mutable_data_ptr<T>());
    combine_rows<T>(e.plan.tokens, e.plan.top_k, e.hidden, rows.const_data_ptr<T>(), e.plan.token_slot,
                    weight_on_input ? nullptr : e.routing_weights.template const_data_ptr<acc_t<T>>(),
                    output.mutable_data_ptr<T>());
  });
  return {output, pre_activation};
}

}  // namespace
}  // namespace fastmoe_cpp::cpu

TORCH_LIBRARY_IMPL(fastmoe_cpp, CPU, m) { m.impl("experts_forward", fastmoe_cpp::cpu::experts_forward); }
