// Combine: every token gathers its K rows and sums them by weight, in order of k.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace fastmoe_cpp {

// rows [T*K, H] -> [T, H]: out[t] = sum_k topk_weights[t, k] * rows[token_slot[t, k]], dropped pairs left out, summed in
// float32 (float64 for float64). No topk_weights: every weight is 1.
at::Tensor combine(const at::Tensor& rows, const std::optional<at::Tensor>& topk_weights, const at::Tensor& slot_index,
                   const at::Tensor& token_slot, const at::Tensor& expert_offsets);
std::tuple<at::Tensor, at::Tensor> combine_backward(const at::Tensor& grad_output, const at::Tensor& rows,
                                                    const std::optional<at::Tensor>& topk_weights,
                                                    const at::Tensor& slot_index, const at::Tensor& token_slot,
                                                    const at::Tensor& expert_offsets, std::array<bool, 2> output_mask);

}  // namespace fastmoe_cpp
