// What the experts' forward and backward share: the problem as pointers, and the up projection of one block, which
// backward repeats where the pre-activation was not kept.
#pragma once
#include <ATen/core/Tensor.h>

#include "../ops/checks.h"
#include "gemm.h"
#include "plan.h"
#include "types.h"

namespace fastmoe_cpp::cpu {

// Rows of an expert that are multiplied at once, and columns of the intermediate size between two activations: large
// enough for the BLAS to run at its full rate, small enough for the block to stay in the second-level cache.
inline constexpr int64_t kBlockRows = 256, kBlockColumns = 512;

template <typename T>
struct Experts {
  using A = acc_t<T>;

  Experts(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj, const Tensor& topk_weights,
          const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
          const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, std::string_view activation_name,
          double alpha_, double limit_, bool interleaved_, bool weight_on_input_)
      : x(hidden_states.stride(-1) == 1 ? hidden_states : hidden_states.contiguous()),
        gate_up(blas_weight(gate_up_proj)),
        down(blas_weight(down_proj)),
        routing_weights(topk_weights.contiguous()),
        up_bias_tensor(has(gate_up_bias) ? gate_up_bias->contiguous() : Tensor()),
        down_bias_tensor(has(down_bias) ? down_bias->contiguous() : Tensor()),
        plan(read_plan(slot_index, token_slot, expert_offsets)),
        activation(parse_activation(activation_name)),
        hidden(down.size(1)),
        inner(down.size(2)),
        up_rows(gate_up.size(1)),
        gated(is_gated(activation)),
        interleaved(interleaved_ && gated),
        weight_on_input(weight_on_input_),
        alpha(static_cast<A>(alpha_)),
        limit(static_cast<A>(limit_)),
        blocks(row_blocks(plan.expert_offsets, plan.experts, kBlockRows)),
        loops(kernels<T>()),
        curve(loops.activation[static_cast<int>(activation)]) {}

  // gate_up[expert].T [H, up_rows] and down[expert].T [I, H]
  Matrix<const T> up_weight(int64_t expert) const { return transposed(gate_up, expert); }
  Matrix<const T> down_weight(int64_t expert) const { return transposed(down, expert); }
  const T* up_bias(int64_t expert) const { return slice(up_bias_tensor, expert * up_rows); }
  const T* down_bias(int64_t expert) const { return slice(down_bias_tensor, expert * hidden); }

  A weight(int64_t slot) const { return routing_weights.template const_data_ptr<A>()[plan.slot_index[slot]]; }

  // How the up projection of the blocks is cut into tasks; the same in backward, so that it repeats forward's bits.
  Columns up_columns() const { return cut_columns(blocks.size(), plan.served, inner, hidden * (gated ? 2 : 1)); }

  // The rows [rows, columns] from column `first` on of `source` [T, *] that a block's slots ask for, each times its
  // routing weight where `weighted`.
  void pack(const RowBlock& block, const Tensor& source, int64_t first, int64_t columns, bool weighted, A* to) const {
    const T* from = source.const_data_ptr<T>() + first;
    const int64_t stride = source.stride(0);
    for (int64_t s = block.begin; s < block.end; ++s, to += columns)
      loops.load(columns, from + plan.token(s) * stride, weighted ? weight(s) : A(1), to);
  }

  // pre-activation of a block's rows in columns c0 .. c1 of the intermediate size: gate [rows, c1 - c0] and up the same.
  // `packed` is pack()ed x. Scratch slots 1 and 2.
  void up_block(Scratch& scratch, const RowBlock& block, int64_t c0, int64_t c1, const A* packed, Matrix<A> gate,
                Matrix<A> up) const {
    const int64_t rows = block.rows(), columns = c1 - c0;
    const Matrix<const A> a{packed, hidden, 1};
    const auto w = up_weight(block.expert);
    const T* bias = up_bias(block.expert);
    if (interleaved) {
      A* both = scratch.get<A>(2, rows * 2 * kBlockColumns);
      multiply<T, A>(scratch, rows, 2 * columns, hidden, a, w.at(0, 2 * c0), rows_of(both, 2 * columns));
      for (int64_t r = 0; r < rows; ++r) {
        const A* from = both + r * 2 * columns;
        A *g = gate.data + r * gate.row_stride, *u = up.data + r * up.row_stride;
        for (int64_t c = 0; c < columns; ++c) g[c] = from[2 * c], u[c] = from[2 * c + 1];
      }
    } else if (gated && columns == inner && up.data == gate.data + inner) {
      multiply<T, A>(scratch, rows, 2 * inner, hidden, a, w, gate);
    } else {
      multiply<T, A>(scratch, rows, columns, hidden, a, w.at(0, c0), gate);
      if (gated) multiply<T, A>(scratch, rows, columns, hidden, a, w.at(0, inner + c0), up);
    }
    if (!bias) return;
    const int64_t step = interleaved ? 2 : 1;
    const T *gate_bias = bias + c0 * step, *up_bias = interleaved ? gate_bias + 1 : gate_bias + inner;
    for (int64_t r = 0; r < rows; ++r) {
      A *g = gate.data + r * gate.row_stride, *u = up.data + r * up.row_stride;
      for (int64_t c = 0; c < columns; ++c) g[c] += static_cast<A>(gate_bias[c * step]);
      for (int64_t c = 0; gated && c < columns; ++c) u[c] += static_cast<A>(up_bias[c * step]);
    }
  }

  Tensor x, gate_up, down, routing_weights, up_bias_tensor, down_bias_tensor;
  Plan plan;
  Activation activation;
  int64_t hidden, inner, up_rows;
  bool gated, interleaved, weight_on_input;
  A alpha, limit;
  std::vector<RowBlock> blocks;
  const Kernels<T>& loops;
  const ActivationKernels<A>& curve;

 private:
  static Matrix<const T> transposed(const Tensor& weight, int64_t expert) {
    return {weight.const_data_ptr<T>() + expert * weight.stride(0), weight.stride(2), weight.stride(1)};
  }
  static const T* slice(const Tensor& bias, int64_t offset) {
    return bias.defined() ? bias.const_data_ptr<T>() + offset : nullptr;
  }
};

// out [m, n] of type T and row stride `stride` = a [m, k] @ b [k, n] + bias [n] (or null). a are rows of T. Scratch slots
// 2 and 3.
template <typename T, typename A = acc_t<T>>
void multiply_rows(Scratch& scratch, int64_t m, int64_t n, int64_t k, const T* a, int64_t a_stride, Matrix<const T> b,
                   const T* bias, T* out, int64_t stride) {
  Matrix<A> c;
  if constexpr (std::is_same_v<T, A>) {
    c = rows_of(out, stride);
    multiply<T, T>(scratch, m, n, k, {a, a_stride, 1}, b, c);
  } else {
    c = rows_of(scratch.get<A>(3, m * n), n);
    if (m <= kFewRows) {
      A* wide = scratch.get<A>(2, m * k);
      for (int64_t r = 0; r < m; ++r) kernels<T>().load(k, a + r * a_stride, A(1), wide + r * k);
      multiply<T, A>(scratch, m, n, k, {wide, k, 1}, b, c);
    } else {
      multiply<T, T>(scratch, m, n, k, {a, a_stride, 1}, b, c);
    }
  }
  for (int64_t r = 0; r < m; ++r) {
    A* row = c.data + r * c.row_stride;
    for (int64_t i = 0; bias && i < n; ++i) row[i] += static_cast<A>(bias[i]);
    if constexpr (!std::is_same_v<T, A>) kernels<T>().store(n, row, out + r * stride);
  }
}

}  // namespace fastmoe_cpp::cpu
