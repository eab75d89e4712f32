// Backward in three steps: the gradient of every pre-activation, by tasks (row block, columns of I); the weight and
// row gradients, by tasks (expert, columns of H) and (row block, columns of H); the sum of row gradients into tokens.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "combine.h"
#include "experts.h"
#include "memory.h"

namespace fastmoe_cpp::cpu {
namespace {

// What the first step leaves: gradients in the order of the weight's rows (gate and up rows alternate if interleaved).
template <typename T>
struct Inner {
  T *grad_pre, *scaled_act;  // [P, up_rows], [P, I] (times the routing weight, where that scales the output)
  acc_t<T>* grad_weight;     // [ranges of columns, P] partial <dA, A>, or null
};

template <typename T>
void inner_gradients(const Experts<T>& e, const Tensor& grad_output, const T* pre_activation, const Inner<T>& to) {
  using A = acc_t<T>;
  const auto columns = e.up_columns();
  run_tasks(e.blocks.size() * columns.count, [&](int64_t task, Scratch& scratch) {
    const auto& block = e.blocks[task / columns.count];
    const int64_t rows = block.rows(), range = task % columns.count;
    A* grads = scratch.get<A>(0, kBlockRows * e.hidden);
    e.pack(block, grad_output, 0, e.hidden, false, grads);
    A* packed = nullptr;
    if (!pre_activation) {
      packed = scratch.get<A>(4, kBlockRows * e.hidden);
      e.pack(block, e.x, 0, e.hidden, e.weight_on_input, packed);
    }
    for (int64_t c0 = columns.begin(range); c0 < columns.end(range); c0 += kBlockColumns) {
      const int64_t c1 = std::min(c0 + kBlockColumns, columns.end(range)), width = c1 - c0;
      A* grad_act = scratch.get<A>(5, kBlockRows * kBlockColumns);
      multiply<T, A>(scratch, rows, width, e.hidden, {grads, e.hidden, 1}, e.down_weight(block.expert).t().at(0, c0),
                     rows_of(grad_act, width));
      A* pre = scratch.get<A>(1, kBlockRows * 2 * kBlockColumns);
      if (!pre_activation)
        e.up_block(scratch, block, c0, c1, packed, rows_of(pre, 2 * width), rows_of(pre + width, 2 * width));
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t slot = block.begin + r;
        A gate[kBlockColumns], up[kBlockColumns], value[kBlockColumns];
        const A *g = gate, *u = up;
        if (!pre_activation) {
          g = pre + r * 2 * width, u = g + width;
          if constexpr (!std::is_same_v<T, A>) {
            // what forward would have kept
            T kept[2 * kBlockColumns];
            e.loops.store(2 * width, g, kept);
            e.loops.load(width, kept, A(1), gate);
            e.loops.load(width, kept + width, A(1), up);
            g = gate, u = up;
          }
        } else if constexpr (std::is_same_v<T, A>) {
          g = pre_activation + slot * e.up_rows + c0, u = g + e.inner;
        } else {
          const T* kept = pre_activation + slot * e.up_rows + c0;
          e.loops.load(width, kept, A(1), gate);
          if (e.gated) e.loops.load(width, kept + e.inner, A(1), up);
        }
        const A weight = e.weight_on_input ? A(1) : e.weight(slot);
        const A product =
            e.curve.backward(width, g, u, grad_act + r * width, weight, value, gate, up, e.alpha, e.limit);
        if (to.grad_weight) {
          A& sum = to.grad_weight[range * e.plan.served + slot];
          sum = c0 == columns.begin(range) ? product : sum + product;
        }
        e.loops.store(width, value, to.scaled_act + slot * e.inner + c0);
        T* out = to.grad_pre + slot * e.up_rows;
        if (e.interleaved) {
          A both[2 * kBlockColumns];
          for (int64_t c = 0; c < width; ++c) both[2 * c] = gate[c], both[2 * c + 1] = up[c];
          e.loops.store(2 * width, both, out + 2 * c0);
        } else {
          e.loops.store(width, gate, out + c0);
          if (e.gated) e.loops.store(width, up, out + e.inner + c0);
        }
      }
    }
  });
}

// A weight's gradient grad [E, left, right] = left.T @ right summed over an expert's slots, where one side is gathered
// from tokens and cut into columns (`gathered`, H) and the other has its rows by slot (`by_slot`, [P, width]).
template <typename T>
struct WeightGradient {
  Tensor gathered;
  const T* by_slot;
  int64_t width;
  bool gathered_left, weighted;  // weighted: gathered rows are scaled by the routing weight
  T* grad;
  acc_t<T>* main_grad;  // not null: what the gradient is added to, in place of grad
};

// Rows summed before the next are added: bounds the gathered copy when one expert has most of the tokens.
constexpr int64_t kDepthRows = 4096;

template <typename T>
void weight_gradient(Scratch& scratch, const Experts<T>& e, const WeightGradient<T>& w, int64_t expert, int64_t h0,
                     int64_t h1) {
  using A = acc_t<T>;
  const int64_t columns = h1 - h0, first = e.plan.expert_offsets[expert], last = e.plan.expert_offsets[expert + 1];
  // the block of the gradient: rows h0 .. h1 if gathered_left, columns h0 .. h1 otherwise
  const int64_t m = w.gathered_left ? columns : w.width, n = w.gathered_left ? w.width : columns;
  const int64_t stride = w.gathered_left ? w.width : e.hidden;
  const int64_t at = expert * e.hidden * w.width + (w.gathered_left ? h0 * w.width : h0);
  const bool adds = w.main_grad != nullptr;
  T* out = adds ? nullptr : w.grad + at;
  if (first == last) {
    if (adds) return;
    for (int64_t r = 0; r < m; ++r) std::fill_n(out + r * stride, n, T(0));
    return;
  }
  Matrix<A> sum;
  if (adds) {
    sum = rows_of(w.main_grad + at, stride);
  } else if constexpr (std::is_same_v<T, A>) {
    sum = rows_of(out, stride);
  } else {
    sum = rows_of(scratch.get<A>(3, m * n), n);
  }
  for (int64_t s = first; s < last; s += kDepthRows) {
    const RowBlock block{expert, s, std::min(s + kDepthRows, last)};
    A* copy = scratch.get<A>(0, std::min(kDepthRows, last - first) * columns);
    e.pack(block, w.gathered, h0, columns, w.weighted, copy);
    const Matrix<const A> gathered{copy, columns, 1};
    const Matrix<const T> by_slot{w.by_slot + s * w.width, w.width, 1};
    if (w.gathered_left) {
      multiply<T, A>(scratch, m, n, block.rows(), gathered.t(), by_slot, sum, adds || s > first);
    } else {
      // the transposed product, so that the converted side is on the right
      multiply<T, A>(scratch, n, m, block.rows(), gathered.t(), by_slot, sum.t(), adds || s > first);
    }
  }
  if constexpr (!std::is_same_v<T, A>) {
    if (adds) return;
    for (int64_t r = 0; r < m; ++r) e.loops.store(n, sum.data + r * n, out + r * stride);
  }
}

// grad_bias [columns] = the sum over an expert's slots of the rows that `row(slot, buffer)` gives.
template <typename T, typename Row>
void bias_gradient(Scratch& scratch, const Experts<T>& e, int64_t expert, int64_t columns, const Row& row, T* out) {
  using A = acc_t<T>;
  ColumnSum sum(columns, scratch.get<double>(0, columns));
  A* buffer = scratch.get<A>(1, columns);
  for (int64_t s = e.plan.expert_offsets[expert]; s < e.plan.expert_offsets[expert + 1]; ++s) {
    row(s, buffer);
    sum.add(buffer);
  }
  sum.store(out);
}

template <typename T>
struct Gradients {
  Tensor hidden, gate_up, down, weights, gate_up_bias, down_bias;
  Tensor gate_up_main, down_main;  // undefined where the gradient is returned
};

template <typename T>
void outer_gradients(const Experts<T>& e, const Tensor& grad_output, const Inner<T>& inner, const Gradients<T>& to,
                     T* grad_rows) {
  using A = acc_t<T>;
  const auto rows = cut_columns(e.blocks.size(), e.plan.served, e.hidden, e.up_rows);
  const int64_t experts = e.plan.experts;
  const auto weight_columns = cut_columns(experts, e.plan.served, e.hidden, std::max(e.up_rows, e.inner));
  const auto wanted = [](const Tensor& t, int64_t tasks) { return t.defined() && t.numel() ? tasks : int64_t(0); };
  const int64_t row_tasks = grad_rows ? int64_t(e.blocks.size()) * rows.count : 0;
  const auto weight_tasks = [&](const Tensor& grad, const Tensor& main_grad) {
    return wanted(main_grad.defined() ? main_grad : grad, experts * weight_columns.count);
  };
  const int64_t up_tasks = weight_tasks(to.gate_up, to.gate_up_main);
  const int64_t down_tasks = weight_tasks(to.down, to.down_main);
  const int64_t up_bias_tasks = wanted(to.gate_up_bias, experts), down_bias_tasks = wanted(to.down_bias, experts);
  const WeightGradient<T> up{e.x,
                             inner.grad_pre,
                             e.up_rows,
                             false,
                             e.weight_on_input,
                             up_tasks ? pointer_or_null<T>(to.gate_up) : nullptr,
                             pointer_or_null<A>(to.gate_up_main)};
  const WeightGradient<T> down{grad_output,
                               inner.scaled_act,
                               e.inner,
                               true,
                               false,
                               down_tasks ? pointer_or_null<T>(to.down) : nullptr,
                               pointer_or_null<A>(to.down_main)};
  run_tasks(row_tasks + up_tasks + down_tasks + up_bias_tasks + down_bias_tasks, [&](int64_t task, Scratch& scratch) {
    if (task < row_tasks) {
      const auto& block = e.blocks[task / rows.count];
      const int64_t c0 = rows.begin(task % rows.count), c1 = rows.end(task % rows.count);
      multiply_rows<T>(scratch, block.rows(), c1 - c0, e.up_rows, inner.grad_pre + block.begin * e.up_rows, e.up_rows,
                       e.up_weight(block.expert).t().at(0, c0), nullptr, grad_rows + block.begin * e.hidden + c0,
                       e.hidden);
      return;
    }
    task -= row_tasks;
    if (task < up_tasks + down_tasks) {
      const auto& w = task < up_tasks ? up : down;
      if (task >= up_tasks) task -= up_tasks;
      const int64_t range = task % weight_columns.count;
      weight_gradient(scratch, e, w, task / weight_columns.count, weight_columns.begin(range),
                      weight_columns.end(range));
      return;
    }
    task -= up_tasks + down_tasks;
    if (task < up_bias_tasks) {
      bias_gradient(
          scratch, e, task, e.up_rows,
          [&](int64_t s, A* row) { e.loops.load(e.up_rows, inner.grad_pre + s * e.up_rows, A(1), row); },
          to.gate_up_bias.template mutable_data_ptr<T>() + task * e.up_rows);
    } else {
      const int64_t expert = task - up_bias_tasks;
      bias_gradient(
          scratch, e, expert, e.hidden,
          [&](int64_t s, A* row) { e.pack({expert, s, s + 1}, grad_output, 0, e.hidden, !e.weight_on_input, row); },
          to.down_bias.template mutable_data_ptr<T>() + expert * e.hidden);
    }
  });
}

// The gradient of the routing weights [T, K], 0 at dropped pairs: <dA, A> + <g, down_bias>, or with the weight on the
// input <x, grad_rows>.
template <typename T>
void routing_gradient(const Experts<T>& e, const Tensor& grad_output, const acc_t<T>* partial, int64_t ranges,
                      const T* grad_rows, acc_t<T>* out) {
  using A = acc_t<T>;
  const Tensor& source = e.weight_on_input ? e.x : grad_output;
  const T* from = source.const_data_ptr<T>();
  for_rows(e.plan.pairs(), e.hidden, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = e.plan.token_slot[i];
      A sum = 0;
      if (slot >= 0) {
        const T* row = from + i / e.plan.top_k * source.stride(0);
        if (e.weight_on_input) {
          sum = e.loops.dot(e.hidden, row, grad_rows + slot * e.hidden);
        } else {
          for (int64_t r = 0; r < ranges; ++r) sum += partial[r * e.plan.served + slot];
          if (e.down_bias_tensor.defined()) {
            const auto* past =
                std::upper_bound(e.plan.expert_offsets, e.plan.expert_offsets + e.plan.experts + 1, slot);
            sum += e.loops.dot(e.hidden, row, e.down_bias(past - e.plan.expert_offsets - 1));
          }
        }
      }
      out[i] = sum;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward_accumulate(
    const Tensor& grad_output_, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
    std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
    bool weight_on_input, std::array<bool, 6> output_mask, const OptionalTensor& gate_up_main_grad,
    const OptionalTensor& down_main_grad, const OptionalTensor& workspace) {
  check_experts_backward(grad_output_, hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot,
                         expert_offsets, gate_up_bias, down_bias, pre_activation, activation);
  check_main_grads(gate_up_proj, down_proj, gate_up_main_grad, down_main_grad);
  check_workspace(workspace, hidden_states, gate_up_proj, slot_index);
  const auto main_of = [&](int i, const OptionalTensor& t) { return output_mask[i] && has(t) ? *t : Tensor(); };
  const Tensor gate_up_main = main_of(1, gate_up_main_grad), down_main = main_of(2, down_main_grad);
  output_mask[1] = output_mask[1] && !has(gate_up_main_grad);
  output_mask[2] = output_mask[2] && !has(down_main_grad);
  const auto options = hidden_states.options();
  const Tensor grad_output = grad_output_.stride(-1) == 1 ? grad_output_ : grad_output_.contiguous();
  const Tensor kept = has(pre_activation) ? pre_activation->contiguous() : Tensor();
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> result;
  with_floating(hidden_states.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Experts<T> e(hidden_states, gate_up_proj, down_proj, topk_weights, slot_index, token_slot, expert_offsets,
                       gate_up_bias, down_bias, activation, activation_alpha, activation_limit, interleaved,
                       weight_on_input);
    const auto wanted = [&](int i, at::IntArrayRef sizes, const at::TensorOptions& as) {
      return output_mask[i] ? empty(sizes, as) : at::empty({0}, as);
    };
    const Gradients<T> to{wanted(0, hidden_states.sizes(), options),
                          wanted(1, gate_up_proj.sizes(), options),
                          wanted(2, down_proj.sizes(), options),
                          wanted(3, topk_weights.sizes(), topk_weights.options()),
                          wanted(4, {e.plan.experts, e.up_rows}, options),
                          wanted(5, {e.plan.experts, e.hidden}, options),
                          gate_up_main,
                          down_main};
    const bool need_rows = output_mask[0] || (output_mask[3] && weight_on_input);
    const bool need_partial = output_mask[3] && !weight_on_input;
    const int64_t ranges = e.up_columns().count;
    // Where gate and up alternate in the gradient but not in the pre-activation, a task would overwrite another's.
    const bool works_there = has(workspace) && !e.interleaved;
    const Tensor grad_pre = works_there ? *workspace : empty({e.plan.served, e.up_rows}, options);
    const Tensor scaled_act = empty({e.plan.served, e.inner}, options);
    const Tensor partial = at::empty({need_partial ? ranges * e.plan.served : 0}, topk_weights.options());
    const Tensor grad_rows = empty({need_rows ? e.plan.served : 0, e.hidden}, options);
    const Inner<T> inner{grad_pre.mutable_data_ptr<T>(), scaled_act.mutable_data_ptr<T>(),
                         need_partial ? partial.mutable_data_ptr<A>() : nullptr};
    inner_gradients(e, grad_output, pointer_or_null<const T>(kept), inner);
    T* rows = need_rows ? grad_rows.mutable_data_ptr<T>() : nullptr;
    outer_gradients(e, grad_output, inner, to, rows);
    if (output_mask[0]) {
      combine_rows<T>(e.plan.tokens, e.plan.top_k, e.hidden, rows, e.plan.token_slot,
                      weight_on_input ? e.routing_weights.template const_data_ptr<A>() : nullptr,
                      to.hidden.template mutable_data_ptr<T>());
    }
    if (output_mask[3]) {
      routing_gradient<T>(e, grad_output, need_partial ? partial.const_data_ptr<A>() : nullptr, ranges, rows,
                          to.weights.template mutable_data_ptr<A>());
    }
    result = {to.hidden, to.gate_up, to.down, to.weights, to.gate_up_bias, to.down_bias};
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& grad_output, const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& slot_index, const Tensor& token_slot, const Tensor& expert_offsets,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& pre_activation,
    std::string_view activation, double activation_alpha, double activation_limit, bool interleaved,
    bool weight_on_input, std::array<bool, 6> output_mask) {
  return experts_backward_accumulate(grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, slot_index,
                                     token_slot, expert_offsets, gate_up_bias, down_bias, pre_activation, activation,
                                     activation_alpha, activation_limit, interleaved, weight_on_input, output_mask,
                                     std::nullopt, std::nullopt, std::nullopt);
}

}  // namespace
}  // namespace fastmoe_cpp::cpu

TORCH_LIBRARY_IMPL(fastmoe_cpp, CPU, m) {
  m.impl("experts_backward", fastmoe_cpp::cpu::experts_backward);
  m.impl("experts_backward_accumulate", fastmoe_cpp::cpu::experts_backward_accumulate);
}
