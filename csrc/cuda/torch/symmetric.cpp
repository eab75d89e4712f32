#include "../symmetric.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "../../ops/symmetric.h"
#include "launch.h"

namespace fastmoe_cpp::cuda {
namespace {

SymmetricGroup group_of(const Tensor& peers, at::IntArrayRef space, std::string_view name) {
  SymmetricGroup g{symmetric::space_of(peers, space), peers.const_data_ptr<int64_t>(), {}};
  name.copy(g.name, sizeof(g.name) - 1);
  return g;
}

std::tuple<Tensor, Tensor, Tensor> token_ranks_op(const Tensor& token_slot, const Tensor& expert_offsets, int64_t each,
                                                  int64_t ranks) {
  symmetric::check_token_ranks(token_slot, expert_offsets, each, ranks);
  const c10::cuda::CUDAGuard guard(token_slot.device());
  const int64_t tokens = token_slot.size(0), top_k = token_slot.size(1);
  const Tensor ids = at::empty_like(token_slot), to = at::empty({tokens, std::min(top_k, ranks)}, token_slot.options());
  const Tensor pairs = at::zeros({ranks}, token_slot.options());
  C10_CUDA_CHECK(token_ranks(
      {tokens, static_cast<int>(top_k), static_cast<int>(expert_offsets.size(0) - 1), static_cast<int>(each),
       static_cast<int>(ranks), token_slot.const_data_ptr<int32_t>(), expert_offsets.const_data_ptr<int32_t>(),
       ids.mutable_data_ptr<int32_t>(), to.mutable_data_ptr<int32_t>(), pairs.mutable_data_ptr<int32_t>()},
      c10::cuda::getCurrentCUDAStream()));
  return {ids, to, pairs};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pull_op(const Tensor& x_, const OptionalTensor& weights_,
                                                           const OptionalTensor& ids, const Tensor& slot_index,
                                                           const Tensor& offsets, const Tensor& pairs,
                                                           const Tensor& peers, at::IntArrayRef space,
                                                           std::string_view name, int64_t max_rows) {
  const SymmetricGroup group = group_of(peers, space, name);
  const auto& s = group.space;
  symmetric::check_pull(s, x_, weights_, ids, slot_index, offsets, pairs, peers);
  const c10::cuda::CUDAGuard guard(x_.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor x = x_.contiguous(), weights = has(weights_) ? weights_->contiguous() : Tensor();
  const bool chosen = weights.defined();
  const int64_t row_bytes = x.size(1) * x.element_size(), wide = symmetric::weight_bytes(x.scalar_type());
  C10_CUDA_CHECK(
      stage({group, x.size(0), slot_index.size(0), row_bytes, wide, x.const_data_ptr(), data_or_null(weights),
             chosen ? ids->const_data_ptr<int32_t>() : nullptr, slot_index.const_data_ptr<int32_t>(),
             offsets.const_data_ptr<int32_t>(), pairs.const_data_ptr<int32_t>()},
            stream));
  const Tensor layout = at::empty({symmetric::layout_size(s.ranks)}, offsets.options());
  C10_CUDA_CHECK(barrier({group, layout.mutable_data_ptr<int32_t>(), max_rows, row_bytes}, stream));
  Tensor on_host = at::empty({0}, at::kLong);
  int64_t rows = max_rows;
  if (max_rows < 0) {
    const Tensor copy = layout.cpu();
    const auto* values = copy.const_data_ptr<int32_t>();
    rows = values[s.ranks];
    on_host = at::tensor({rows, static_cast<int64_t>(values[2 * s.ranks + 1])}, at::kLong);
  }
  const Tensor out = at::empty({rows, x.size(1)}, x.options());
  const Tensor out_weights =
      at::empty({chosen ? rows : 0, s.top_k}, x.options().dtype(accumulate_type(x.scalar_type())));
  const Tensor out_ids = at::empty({chosen ? rows : 0, s.top_k}, offsets.options());
  C10_CUDA_CHECK(
      pull({group, rows, row_bytes, wide, layout.const_data_ptr<int32_t>(), out.mutable_data_ptr(),
            chosen ? out_weights.mutable_data_ptr() : nullptr, chosen ? out_ids.mutable_data_ptr<int32_t>() : nullptr},
           stream));
  return {out, out_weights, out_ids, layout, on_host};
}

std::tuple<Tensor, Tensor> push_op(const Tensor& rows_, const OptionalTensor& weights_, const Tensor& layout,
                                   const Tensor& token_slot, const Tensor& peers, at::IntArrayRef space,
                                   std::string_view name) {
  const SymmetricGroup group = group_of(peers, space, name);
  const auto& s = group.space;
  symmetric::check_push(s, rows_, weights_, layout, token_slot, peers);
  const c10::cuda::CUDAGuard guard(rows_.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor rows = rows_.contiguous(), weights = has(weights_) ? weights_->contiguous() : Tensor();
  const int64_t row_bytes = rows.size(1) * rows.element_size(), wide = symmetric::weight_bytes(rows.scalar_type());
  C10_CUDA_CHECK(push({group, rows.size(0), row_bytes, wide, layout.const_data_ptr<int32_t>(), rows.const_data_ptr(),
                       data_or_null(weights)},
                      stream));
  C10_CUDA_CHECK(barrier({group, nullptr, -1, row_bytes}, stream));
  const int64_t tokens = token_slot.size(0);
  const Tensor sums = at::empty({tokens, rows.size(1)}, rows.options());
  const Tensor out_weights =
      at::empty({weights.defined() ? tokens : 0, s.top_k}, rows.options().dtype(accumulate_type(rows.scalar_type())));
  C10_CUDA_CHECK(sum({group, dtype_of(rows), tokens, rows.size(1), row_bytes, token_slot.const_data_ptr<int32_t>(),
                      sums.mutable_data_ptr(), weights.defined() ? out_weights.mutable_data_ptr() : nullptr},
                     stream));
  return {sums, out_weights};
}

}  // namespace
}  // namespace fastmoe_cpp::cuda

TORCH_LIBRARY_IMPL(fastmoe_cpp_symmetric, CUDA, m) {
  m.impl("token_ranks", fastmoe_cpp::cuda::token_ranks_op);
  m.impl("pull", fastmoe_cpp::cuda::pull_op);
  m.impl("push", fastmoe_cpp::cuda::push_op);
}
