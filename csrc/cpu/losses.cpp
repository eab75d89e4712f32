#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "../ops/checks.h"
#include "parallel.h"
#include "types.h"

namespace fastmoe_cpp::cpu {
namespace {

// Sums over tokens are taken in parts of this many and the parts' sums then added in order.
constexpr int64_t kPart = 1024;

int64_t parts_of(int64_t n) { return (n + kPart - 1) / kPart; }

// tokens_per_expert, int64 or floating, as float64 [S, E].
Tensor counts_as_double(const Tensor& tokens_per_expert) { return tokens_per_expert.to(at::kDouble).contiguous(); }

const bool* padding_of(const OptionalTensor& mask, Tensor& keep) {
  if (!has(mask)) return nullptr;
  keep = mask->contiguous();
  return keep.const_data_ptr<bool>();
}

double total(const std::vector<double>& parts) {
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
}

Tensor scalar(double value, const Tensor& like) {
  const auto type = accumulate_type(like.scalar_type());
  Tensor out = at::empty({}, like.options().dtype(type));
  if (type == at::kDouble)
    *out.mutable_data_ptr<double>() = value;
  else
    *out.mutable_data_ptr<float>() = static_cast<float>(value);
  return out;
}

double number(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : double(*t.const_data_ptr<float>());
}

Tensor expert_counts(const Tensor& topk_ids, int64_t num_experts, const OptionalTensor& padding_mask) {
  check_expert_counts(topk_ids, num_experts, padding_mask);
  const Tensor ids = topk_ids.to(at::kLong).contiguous();
  Tensor mask;
  const bool* skip = padding_of(padding_mask, mask);
  const int64_t sequences = ids.size(0), length = ids.size(1), top_k = ids.size(2), parts = parts_of(length);
  std::vector<int64_t> counts(sequences * parts * num_experts, 0);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  at::parallel_for(0, sequences * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task / parts, first = task % parts * kPart;
      int64_t* count = counts.data() + task * num_experts;
      for (int64_t t = s * length + first; t < s * length + std::min(length, first + kPart); ++t) {
        if (skip && skip[t]) continue;
        for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
          TORCH_CHECK_VALUE(id[i] >= -1 && id[i] < num_experts, "topk_ids must be -1 or between 0 and ",
                            num_experts - 1, ", got ", id[i]);
          if (id[i] >= 0) ++count[id[i]];
        }
      }
    }
  });
  Tensor out = at::zeros({sequences, num_experts}, ids.options());
  int64_t* sum = out.mutable_data_ptr<int64_t>();
  for (int64_t task = 0; task < sequences * parts; ++task)
    for (int64_t e = 0; e < num_experts; ++e) sum[task / parts * num_experts + e] += counts[task * num_experts + e];
  return out;
}

Tensor balance_loss(const Tensor& scores_, const Tensor& tokens_per_expert, double scale,
                    const OptionalTensor& padding_mask) {
  check_balance_loss(scores_, tokens_per_expert, padding_mask);
  const Tensor scores = scores_.contiguous(), counts = counts_as_double(tokens_per_expert);
  Tensor mask;
  const bool* skip = padding_of(padding_mask, mask);
  const int64_t sequences = scores.size(0), length = scores.size(1), experts = scores.size(2), parts = parts_of(length);
  std::vector<double> sums(sequences * parts, 0);
  with_floating(scores.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* x = scores.const_data_ptr<T>();
    const double* count = counts.const_data_ptr<double>();
    at::parallel_for(0, sequences * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> row(experts);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t s = task / parts, first = task % parts * kPart;
        for (int64_t t = s * length + first; t < s * length + std::min(length, first + kPart); ++t) {
          if (skip && skip[t]) continue;
          kernels<T>().load(experts, x + t * experts, A(1), row.data());
          double sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t e = 0; e < experts; ++e) sum += count[s * experts + e] * row[e];
          sums[task] += sum;
        }
      }
    });
  });
  return scalar(scale * total(sums), scores);
}

Tensor balance_loss_backward(const Tensor& grad_loss, const Tensor& scores, const Tensor& tokens_per_expert,
                             double scale, const OptionalTensor& padding_mask) {
  check_balance_loss_backward(grad_loss, scores, tokens_per_expert, padding_mask);
  const Tensor counts = counts_as_double(tokens_per_expert);
  Tensor mask;
  const bool* skip = padding_of(padding_mask, mask);
  const int64_t length = scores.size(1), experts = scores.size(2);
  Tensor grad = at::empty(scores.sizes(), scores.options());
  const double factor = scale * number(grad_loss);
  with_floating(scores.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* out = grad.mutable_data_ptr<T>();
    const double* count = counts.const_data_ptr<double>();
    for_rows(scores.size(0) * length, experts, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const bool left_out = skip && skip[t];
        for (int64_t e = 0; e < experts; ++e)
          out[t * experts + e] =
              left_out ? T(0) : static_cast<T>(static_cast<acc_t<T>>(factor * count[t / length * experts + e]));
      }
    });
  });
  return grad;
}

// exp(row - shift) into `row` and log(sum(exp(row))).
template <typename A>
A exp_and_log_sum(int64_t n, A* row) {
  A shift = -std::numeric_limits<A>::infinity();
  for (int64_t e = 0; e < n; ++e) shift = row[e] > shift ? row[e] : shift;
  if (std::isinf(shift)) shift = 0;
  return shift + std::log(kernels<A>().exp(n, row, shift, row));
}

int64_t unpadded(const bool* skip, int64_t tokens) {
  int64_t count = tokens;
  for (int64_t t = 0; skip && t < tokens; ++t) count -= skip[t];
  return count;
}

Tensor z_loss(const Tensor& logits_, double scale, const OptionalTensor& padding_mask) {
  check_z_loss(logits_, padding_mask);
  const Tensor logits = logits_.contiguous();
  Tensor mask;
  const bool* skip = padding_of(padding_mask, mask);
  const int64_t tokens = logits.size(0), experts = logits.size(1), parts = parts_of(tokens);
  std::vector<double> sums(parts, 0);
  with_floating(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* x = logits.const_data_ptr<T>();
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> row(experts);
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t t = part * kPart; t < std::min(tokens, (part + 1) * kPart); ++t) {
          if (skip && skip[t]) continue;
          kernels<T>().load(experts, x + t * experts, A(1), row.data());
          const double lse = exp_and_log_sum(experts, row.data());
          sums[part] += lse * lse;
        }
      }
    });
  });
  const int64_t count = unpadded(skip, tokens);
  return scalar(count ? scale * total(sums) / count : 0, logits);
}

Tensor z_loss_backward(const Tensor& grad_loss, const Tensor& logits_, double scale,
                       const OptionalTensor& padding_mask) {
  check_z_loss_backward(grad_loss, logits_, padding_mask);
  const Tensor logits = logits_.contiguous();
  Tensor mask;
  const bool* skip = padding_of(padding_mask, mask);
  const int64_t tokens = logits.size(0), experts = logits.size(1), count = unpadded(skip, tokens);
  Tensor grad = at::empty(logits.sizes(), logits.options());
  const double factor = count ? 2 * scale * number(grad_loss) / count : 0;
  with_floating(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const T* x = logits.const_data_ptr<T>();
    T* out = grad.mutable_data_ptr<T>();
    for_rows(tokens, experts * 8, [&](int64_t begin, int64_t end) {
      std::vector<A> row(experts);
      for (int64_t t = begin; t < end; ++t) {
        if (skip && skip[t]) {
          std::fill(row.begin(), row.end(), A(0));
        } else {
          kernels<T>().load(experts, x + t * experts, A(1), row.data());
          const A lse = exp_and_log_sum(experts, row.data());
          A sum = 0;
          for (A e : row) sum += e;
          const A slope = static_cast<A>(factor * lse) / sum;
          for (A& e : row) e *= slope;
        }
        kernels<T>().store(experts, row.data(), out + t * experts);
      }
    });
  });
  return grad;
}

void update_expert_bias(Tensor& expert_bias, const Tensor& tokens_per_expert, double rate, bool zero_mean) {
  check_update_expert_bias(expert_bias, tokens_per_expert);
  const Tensor counts = counts_as_double(tokens_per_expert);
  const int64_t experts = counts.size(0), stride = expert_bias.stride(0);
  const double* count = counts.const_data_ptr<double>();
  double mean = 0;
  for (int64_t e = 0; e < experts; ++e) mean += count[e];
  mean /= experts;
  std::vector<double> step(experts);
  double mean_step = 0;
  for (int64_t e = 0; e < experts; ++e) {
    step[e] = rate * ((mean > count[e]) - (mean < count[e]));
    mean_step += step[e] / experts;
  }
  with_accumulator(expert_bias.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    A* bias = expert_bias.mutable_data_ptr<A>();
    for (int64_t e = 0; e < experts; ++e) bias[e * stride] += static_cast<A>(step[e] - (zero_mean ? mean_step : 0));
  });
}

}  // namespace
}  // namespace fastmoe_cpp::cpu

TORCH_LIBRARY_IMPL(fastmoe_cpp, CPU, m) {
  using namespace fastmoe_cpp::cpu;
  m.impl("expert_counts", expert_counts);
  m.impl("balance_loss", balance_loss);
  m.impl("balance_loss_backward", balance_loss_backward);
  m.impl("z_loss", z_loss);
  m.impl("z_loss_backward", z_loss_backward);
  m.impl("update_expert_bias", update_expert_bias);
}
