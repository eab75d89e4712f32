#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "../ops/checks.h"
#include "gemm.h"
#include "plan.h"
#include "types.h"

namespace fastmoe_cpp::cpu {
namespace {

constexpr int64_t kRows = 256;

// --- logits ---

template <typename A>
void load_rows(const Tensor& x, int64_t first, int64_t rows, A* to) {
  const int64_t width = x.size(1), stride = x.stride(0);
  with_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<acc_t<T>, A>) {
      const T* from = x.const_data_ptr<T>() + first * stride;
      for (int64_t r = 0; r < rows; ++r) kernels<T>().load(width, from + r * stride, A(1), to + r * width);
    }
  });
}

// As it is, or converted where only one of the operands is float64: then all is computed in float64.
Tensor operand(const Tensor& t, at::ScalarType type) {
  const Tensor x = accumulate_type(t.scalar_type()) == type ? t : t.to(type);
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

at::ScalarType logits_type(const Tensor& hidden_states, const Tensor& weight) {
  const bool wide = hidden_states.scalar_type() == at::kDouble || weight.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

Tensor router_logits(const Tensor& hidden_states, const Tensor& weight, const OptionalTensor& bias) {
  check_router_logits(hidden_states, weight, bias);
  const auto type = logits_type(hidden_states, weight);
  const Tensor x = operand(hidden_states, type), w = operand(weight, type).contiguous();
  const Tensor b = has(bias) ? bias->to(type).contiguous() : Tensor();
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = w.size(0);
  Tensor logits = at::empty({tokens, experts}, x.options().dtype(type));
  const int64_t blocks = (tokens + kRows - 1) / kRows;
  const auto columns = cut_columns(blocks, tokens, experts, hidden);
  with_floating(w.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    A* out = logits.mutable_data_ptr<A>();
    const A* add = pointer_or_null<const A>(b);
    run_tasks(blocks * columns.count, [&](int64_t task, Scratch& scratch) {
      const int64_t first = task / columns.count * kRows, rows = std::min(kRows, tokens - first);
      const int64_t c0 = columns.begin(task % columns.count), c1 = columns.end(task % columns.count);
      Matrix<const A> a{};
      if (x.scalar_type() == type) {
        a = {x.const_data_ptr<A>() + first * x.stride(0), x.stride(0), 1};
      } else {
        A* copy = scratch.get<A>(0, rows * hidden);
        load_rows(x, first, rows, copy);
        a = {copy, hidden, 1};
      }
      multiply<T, A>(scratch, rows, c1 - c0, hidden, a, Matrix<const T>{w.const_data_ptr<T>() + c0 * hidden, 1, hidden},
                     rows_of(out + first * experts + c0, experts));
      for (int64_t r = first; add && r < first + rows; ++r)
        for (int64_t e = c0; e < c1; ++e) out[r * experts + e] += add[e];
    });
  });
  return logits;
}

// out [columns] = the sum of the rows of x [n, columns]
template <typename A>
void sum_rows(int64_t n, int64_t columns, const A* x, A* out) {
  constexpr int64_t kStrip = 32;
  run_tasks((columns + kStrip - 1) / kStrip, [&](int64_t task, Scratch& scratch) {
    const int64_t c0 = task * kStrip;
    ColumnSum sum(std::min(kStrip, columns - c0), scratch.get<double>(0, kStrip));
    for (int64_t r = 0; r < n; ++r) sum.add(x + r * columns + c0);
    sum.store(out + c0);
  });
}

std::tuple<Tensor, Tensor, Tensor> router_logits_backward(const Tensor& grad_logits, const Tensor& hidden_states,
                                                          const Tensor& weight, std::array<bool, 3> output_mask) {
  check_router_logits_backward(grad_logits, hidden_states, weight);
  const auto type = logits_type(hidden_states, weight);
  const Tensor g = grad_logits.to(type).contiguous();
  const Tensor x = operand(hidden_states, type), w = operand(weight, type).contiguous();
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = w.size(0);
  Tensor grad_hidden = at::empty({0}, hidden_states.options()), grad_weight = at::empty({0}, weight.options());
  Tensor grad_bias = at::empty({0}, grad_logits.options());
  with_accumulator(type, [&](auto zero) {
    using A = decltype(zero);
    const A* grad = g.const_data_ptr<A>();
    if (output_mask[0]) {
      Tensor out = at::empty({tokens, hidden}, x.options().dtype(type));
      const int64_t blocks = (tokens + kRows - 1) / kRows;
      const auto columns = cut_columns(blocks, tokens, hidden, experts);
      with_floating(w.scalar_type(), [&](auto zero_weight) {
        using T = decltype(zero_weight);
        if constexpr (std::is_same_v<acc_t<T>, A>) {
          run_tasks(blocks * columns.count, [&](int64_t task, Scratch& scratch) {
            const int64_t first = task / columns.count * kRows, rows = std::min(kRows, tokens - first);
            const int64_t c0 = columns.begin(task % columns.count), c1 = columns.end(task % columns.count);
            multiply<T, A>(scratch, rows, c1 - c0, experts, {grad + first * experts, experts, 1},
                           Matrix<const T>{w.const_data_ptr<T>() + c0, hidden, 1},
                           rows_of(out.mutable_data_ptr<A>() + first * hidden + c0, hidden));
          });
        }
      });
      grad_hidden = out.to(hidden_states.scalar_type());
    }
    if (output_mask[1]) {
      Tensor out = at::empty({experts, hidden}, w.options().dtype(type));
      const auto columns = cut_columns(1, experts, hidden, tokens);
      with_floating(x.scalar_type(), [&](auto zero_hidden) {
        using T = decltype(zero_hidden);
        if constexpr (std::is_same_v<acc_t<T>, A>) {
          run_tasks(columns.count, [&](int64_t task, Scratch& scratch) {
            const int64_t c0 = columns.begin(task), c1 = columns.end(task);
            multiply<T, A>(scratch, experts, c1 - c0, tokens, {grad, 1, experts},
                           Matrix<const T>{x.const_data_ptr<T>() + c0, x.stride(0), 1},
                           rows_of(out.mutable_data_ptr<A>() + c0, hidden));
          });
        }
      });
      grad_weight = out.to(weight.scalar_type());
    }
    if (output_mask[2]) {
      Tensor out = at::empty({experts}, g.options());
      sum_rows(tokens, experts, grad, out.mutable_data_ptr<A>());
      grad_bias = out.to(grad_logits.scalar_type());
    }
  });
  return {grad_hidden, grad_weight, grad_bias};
}

// Scores of one row. Softmax of a row with a NaN is NaN throughout.
template <typename A>
void score(ScoreFunction f, int64_t n, const A* x, A* y) {
  if (f == ScoreFunction::Softmax) {
    A most = -std::numeric_limits<A>::infinity();
    for (int64_t e = 0; e < n; ++e) most = x[e] > most ? x[e] : most;
    const A sum = kernels<A>().exp(n, x, most, y);
    for (int64_t e = 0; e < n; ++e) y[e] /= sum;
  } else if (f == ScoreFunction::Sigmoid) {
    for (int64_t e = 0; e < n; ++e) y[e] = -x[e];
    kernels<A>().exp(n, y, A(0), y);
    for (int64_t e = 0; e < n; ++e) y[e] = A(1) / (A(1) + y[e]);
  } else {
    for (int64_t e = 0; e < n; ++e)
      y[e] = std::sqrt((x[e] > A(0) ? x[e] : A(0)) + std::log1p(std::exp(-std::abs(x[e]))));
  }
}

// d y / d x of a score applied to `grad`, added to `out`. Elementwise functions take the slope from x and y.
template <typename A>
void score_backward(ScoreFunction f, int64_t n, const A* x, const A* y, const A* grad, A* out) {
  if (f == ScoreFunction::Softmax) {
    A inner = 0;
    for (int64_t e = 0; e < n; ++e) inner += grad[e] * y[e];
    for (int64_t e = 0; e < n; ++e) out[e] += y[e] * (grad[e] - inner);
  } else if (f == ScoreFunction::Sigmoid) {
    for (int64_t e = 0; e < n; ++e) out[e] += grad[e] * y[e] * (A(1) - y[e]);
  } else {
    for (int64_t e = 0; e < n; ++e)
      if (y[e] != A(0)) out[e] += grad[e] / (A(2) * y[e] * (A(1) + std::exp(-x[e])));
  }
}

// --- selection ---

// An order of keys as integers: larger keys are larger, -0 equals 0, every NaN is below -inf.
template <typename A>
auto rank_of(A key) {
  using I = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  if (key != key) return std::numeric_limits<I>::min();
  key += A(0);
  I bits;
  std::memcpy(&bits, &key, sizeof key);
  return bits < 0 ? static_cast<I>(std::numeric_limits<I>::min() - bits) : bits;
}

template <typename A>
class Selector {
 public:
  Selector(int64_t experts, int64_t top_k, int64_t groups, int64_t topk_groups, GroupScore group_score)
      : experts_(experts),
        top_k_(top_k),
        groups_(groups),
        topk_groups_(topk_groups),
        group_score_(group_score),
        ranks_(std::max(experts, groups)),
        order_(std::max(experts, groups)),
        group_keys_(groups) {}

  // The ids of the top_k largest keys; masks `keys` where groups are limited.
  void select(A* keys, int64_t* ids) {
    if (groups_ > 1 && topk_groups_ < groups_) mask_groups(keys);
    largest(keys, experts_, top_k_);
    std::copy_n(order_.begin(), top_k_, ids);
  }

 private:
  // order_[0 .. count): indices of the largest of n keys, in falling order, the lower index first where they tie.
  void largest(const A* keys, int64_t n, int64_t count) {
    for (int64_t i = 0; i < n; ++i) ranks_[i] = rank_of(keys[i]);
    if (count > 32) {
      std::iota(order_.begin(), order_.begin() + n, 0);
      std::partial_sort(order_.begin(), order_.begin() + count, order_.begin() + n,
                        [&](int64_t a, int64_t b) { return ranks_[a] != ranks_[b] ? ranks_[a] > ranks_[b] : a < b; });
      return;
    }
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto rank = ranks_[i];
      if (found == count && rank <= ranks_[order_[count - 1]]) continue;
      int64_t at = found < count ? found++ : count - 1;
      for (; at > 0 && ranks_[order_[at - 1]] < rank; --at) order_[at] = order_[at - 1];
      order_[at] = i;
    }
  }

  void mask_groups(A* keys) {
    constexpr A kNone = -std::numeric_limits<A>::infinity();
    const int64_t size = experts_ / groups_;
    for (int64_t g = 0; g < groups_; ++g) {
      A best = kNone, second = kNone;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        if (keys[e] > best)
          second = best, best = keys[e];
        else if (keys[e] > second)
          second = keys[e];
      }
      group_keys_[g] = group_score_ == GroupScore::Max || size == 1 ? best : best + second;
    }
    largest(group_keys_.data(), groups_, topk_groups_);
    std::vector<bool> keep(groups_, false);
    for (int64_t i = 0; i < topk_groups_; ++i) keep[order_[i]] = true;
    for (int64_t e = 0; e < experts_; ++e)
      if (!keep[e / size] && keys[e] == keys[e]) keys[e] = kNone;
  }

  int64_t experts_, top_k_, groups_, topk_groups_;
  GroupScore group_score_;
  std::vector<decltype(rank_of(A(0)))> ranks_;
  std::vector<int64_t> order_;
  std::vector<A> group_keys_;
};

void check_ids(int64_t n, const int64_t* ids, int64_t experts) {
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_VALUE(ids[i] >= -1 && ids[i] < experts, "topk_ids must be -1 or between 0 and ", experts - 1, ", got ",
                      ids[i]);
}

// Scores of the selected logits by themselves; -1 is left out of a softmax and gets 0. `kept` has room for K.
template <typename A>
void score_selected(ScoreFunction f, int64_t top_k, const int64_t* ids, const A* logits, A* kept, A* scores) {
  int64_t n = 0;
  for (int64_t k = 0; k < top_k; ++k)
    if (ids[k] >= 0) kept[n++] = logits[ids[k]];
  score(f, n, kept, kept);
  n = 0;
  for (int64_t k = 0; k < top_k; ++k) scores[k] = ids[k] >= 0 ? kept[n++] : A(0);
}

std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits_, int64_t top_k, const OptionalTensor& expert_bias,
                                         const OptionalTensor& selection_scores, const OptionalTensor& topk_ids,
                                         std::string_view score_function, bool scores_after_topk, bool renormalize,
                                         double renormalize_epsilon, double scaling_factor, int64_t num_groups,
                                         int64_t topk_groups, std::string_view group_score) {
  check_route(logits_, top_k, expert_bias, selection_scores, topk_ids, score_function, renormalize_epsilon,
              scaling_factor, num_groups, topk_groups, group_score);
  const auto f = parse_score_function(score_function);
  const auto by_group = parse_group_score(group_score);
  const auto type = accumulate_type(logits_.scalar_type());
  const Tensor logits = logits_.to(type).contiguous();
  const Tensor given = has(topk_ids) ? topk_ids->to(at::kLong).contiguous() : Tensor();
  const Tensor other = has(selection_scores) ? selection_scores->to(type).contiguous() : Tensor();
  const Tensor bias = has(expert_bias) ? expert_bias->to(type).contiguous() : Tensor();
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  Tensor weights = at::empty({tokens, top_k}, logits.options());
  Tensor ids = at::empty({tokens, top_k}, logits.options().dtype(at::kLong));
  Tensor scores = at::empty({tokens, experts}, logits.options());
  if (given.defined()) check_ids(given.numel(), given.const_data_ptr<int64_t>(), experts);
  with_accumulator(type, [&](auto zero) {
    using A = decltype(zero);
    const A *l = logits.const_data_ptr<A>(), *s = pointer_or_null<const A>(other), *b = pointer_or_null<const A>(bias);
    for_rows(tokens, experts * 16, [&](int64_t begin, int64_t end) {
      Selector<A> selector(experts, top_k, num_groups, topk_groups, by_group);
      std::vector<A> keys(experts), kept(top_k);
      for (int64_t t = begin; t < end; ++t) {
        const A* x = l + t * experts;
        A* y = scores.mutable_data_ptr<A>() + t * experts;
        A* w = weights.mutable_data_ptr<A>() + t * top_k;
        int64_t* id = ids.mutable_data_ptr<int64_t>() + t * top_k;
        score(f, experts, x, y);
        if (given.defined()) {
          std::copy_n(given.const_data_ptr<int64_t>() + t * top_k, top_k, id);
        } else {
          const A* source = s ? s + t * experts : scores_after_topk ? x : y;
          std::copy_n(source, experts, keys.data());
          if (source == y && f == ScoreFunction::Softmax && y[0] != y[0]) {
            // one NaN logit must not take its row's other experts with it
            for (int64_t e = 0; e < experts; ++e) keys[e] = x[e] == x[e] ? x[e] : -std::numeric_limits<A>::infinity();
            score(f, experts, keys.data(), keys.data());
            for (int64_t e = 0; e < experts; ++e)
              if (x[e] != x[e]) keys[e] = std::numeric_limits<A>::quiet_NaN();
          }
          for (int64_t e = 0; b && e < experts; ++e) keys[e] += b[e];
          selector.select(keys.data(), id);
        }
        if (scores_after_topk)
          score_selected(f, top_k, id, x, kept.data(), w);
        else
          for (int64_t k = 0; k < top_k; ++k) w[k] = id[k] >= 0 ? y[id[k]] : A(0);
        A divisor = 1;
        if (renormalize) {
          A sum = 0;
          bool any = false;
          for (int64_t k = 0; k < top_k; ++k) sum += w[k], any |= id[k] >= 0;
          if (any) divisor = sum + static_cast<A>(renormalize_epsilon);
        }
        for (int64_t k = 0; k < top_k; ++k) w[k] = w[k] / divisor * static_cast<A>(scaling_factor);
      }
    });
  });
  return {weights, ids, scores};
}

Tensor route_backward(const OptionalTensor& grad_topk_weights, const OptionalTensor& grad_scores, const Tensor& logits_,
                      const Tensor& topk_ids, std::string_view score_function, bool scores_after_topk, bool renormalize,
                      double renormalize_epsilon, double scaling_factor) {
  check_route_backward(grad_topk_weights, grad_scores, logits_, topk_ids, score_function);
  const auto f = parse_score_function(score_function);
  const auto type = accumulate_type(logits_.scalar_type());
  const Tensor logits = logits_.to(type).contiguous(), ids = topk_ids.to(at::kLong).contiguous();
  const Tensor from_weights = has(grad_topk_weights) ? grad_topk_weights->to(type).contiguous() : Tensor();
  const Tensor from_scores = has(grad_scores) ? grad_scores->to(type).contiguous() : Tensor();
  const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = ids.size(1);
  check_ids(ids.numel(), ids.const_data_ptr<int64_t>(), experts);
  Tensor grad = at::empty({tokens, experts}, logits.options());
  with_accumulator(type, [&](auto zero) {
    using A = decltype(zero);
    const A *gw = pointer_or_null<const A>(from_weights), *gs = pointer_or_null<const A>(from_scores);
    for_rows(tokens, experts * 16, [&](int64_t begin, int64_t end) {
      std::vector<A> y(experts), dy(experts), kept(top_k), w(top_k), dw(top_k), selected(top_k), dx(top_k);
      for (int64_t t = begin; t < end; ++t) {
        const A* x = logits.const_data_ptr<A>() + t * experts;
        const int64_t* id = ids.const_data_ptr<int64_t>() + t * top_k;
        A* out = grad.mutable_data_ptr<A>() + t * experts;
        const bool through_all = gs || (gw && !scores_after_topk);
        if (through_all) score(f, experts, x, y.data());
        if (gs)
          std::copy_n(gs + t * experts, experts, dy.data());
        else
          std::fill(dy.begin(), dy.end(), A(0));
        std::fill_n(out, experts, A(0));
        if (gw) {
          if (scores_after_topk)
            score_selected(f, top_k, id, x, kept.data(), w.data());
          else
            for (int64_t k = 0; k < top_k; ++k) w[k] = id[k] >= 0 ? y[id[k]] : A(0);
          A total = 1, inner = 0;
          if (renormalize) {
            total = static_cast<A>(renormalize_epsilon);
            for (int64_t k = 0; k < top_k; ++k) total += w[k];
            for (int64_t k = 0; k < top_k; ++k)
              if (id[k] >= 0) inner += gw[t * top_k + k] * (w[k] / total);
          }
          for (int64_t k = 0; k < top_k; ++k)
            dw[k] = id[k] >= 0 ? static_cast<A>(scaling_factor) * (gw[t * top_k + k] - inner) / total : A(0);
          if (scores_after_topk) {
            for (int64_t k = 0; k < top_k; ++k) selected[k] = id[k] >= 0 ? x[id[k]] : A(0);
            std::fill(dx.begin(), dx.end(), A(0));
            score_backward(f, top_k, selected.data(), w.data(), dw.data(), dx.data());
            for (int64_t k = 0; k < top_k; ++k)
              if (id[k] >= 0) out[id[k]] += dx[k];
          } else {
            for (int64_t k = 0; k < top_k; ++k)
              if (id[k] >= 0) dy[id[k]] += dw[k];
          }
        }
        if (through_all) score_backward(f, experts, x, y.data(), dy.data(), out);
      }
    });
  });
  return grad.to(logits_.scalar_type());
}

// --- Sinkhorn ---

// As Megatron-LM computes it: rows and columns of exp(logits) scaled in turn, with this added to every sum.
constexpr double kSinkhornEpsilon = 1e-8;
constexpr int64_t kMostIterations = 10000;

Tensor sinkhorn(const Tensor& logits_, int64_t iterations, double tolerance) {
  check_sinkhorn(logits_, iterations, tolerance);
  const Tensor logits = logits_.to(accumulate_type(logits_.scalar_type())).contiguous();
  const int64_t tokens = logits.size(0), experts = logits.size(1), parts = (tokens + kRows - 1) / kRows;
  Tensor result = at::empty({tokens, experts}, logits.options());
  with_accumulator(logits.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const auto& k = kernels<A>();
    const A eps = static_cast<A>(kSinkhornEpsilon);
    A* cost = result.mutable_data_ptr<A>();
    std::vector<A> row_scale(tokens, A(1)), column_scale(experts, A(1)), before(experts), sums(parts * experts);
    const auto each_part = [&](const auto& f) {
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) f(p, p * kRows, std::min(tokens, (p + 1) * kRows));
      });
    };
    each_part([&](int64_t, int64_t first, int64_t last) {
      k.exp((last - first) * experts, logits.const_data_ptr<A>() + first * experts, A(0), cost + first * experts);
    });
    for (int64_t done = 0; tokens > 0;) {
      each_part([&](int64_t p, int64_t first, int64_t last) {
        std::vector<const A*> rows(last - first);
        for (int64_t t = first; t < last; ++t) {
          rows[t - first] = cost + t * experts;
          row_scale[t] = A(1) / (A(tokens) * (k.dot(experts, column_scale.data(), cost + t * experts) + eps));
        }
        k.weighted_sum(experts, last - first, rows.data(), row_scale.data() + first, sums.data() + p * experts);
      });
      before = column_scale;
      double moved = 0;
      for (int64_t e = 0; e < experts; ++e) {
        A sum = 0;
        for (int64_t p = 0; p < parts; ++p) sum += sums[p * experts + e];
        column_scale[e] = A(1) / (A(experts) * (sum + eps));
        moved += std::abs(double(before[e]) - double(column_scale[e])) / experts;
      }
      ++done;
      if (iterations > 0 ? done == iterations : (!(moved > tolerance) || done == kMostIterations)) break;
    }
    each_part([&](int64_t, int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t e = 0; e < experts; ++e) cost[t * experts + e] *= column_scale[e] * row_scale[t];
    });
  });
  return result;
}

}  // namespace
}  // namespace fastmoe_cpp::cpu

TORCH_LIBRARY_IMPL(fastmoe_cpp, CPU, m) {
  using namespace fastmoe_cpp::cpu;
  m.impl("router_logits", router_logits);
  m.impl("router_logits_backward", router_logits_backward);
  m.impl("route", route);
  m.impl("route_backward", route_backward);
  m.impl("sinkhorn", sinkhorn);
}
