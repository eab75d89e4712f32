#include "plan.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "vector/kernels.h"

namespace fastmoe_cpp::cpu {

void check_offsets(const at::Tensor& expert_offsets, int64_t rows) {
  const auto* offsets = expert_offsets.const_data_ptr<int32_t>();
  const int64_t experts = expert_offsets.size(0) - 1;
  TORCH_CHECK_VALUE(offsets[0] == 0, "expert_offsets must begin with 0, got ", offsets[0]);
  for (int64_t e = 0; e < experts; ++e)
    TORCH_CHECK_VALUE(offsets[e] <= offsets[e + 1], "expert_offsets must not fall, got ", offsets[e], " then ",
                      offsets[e + 1], " at expert ", e);
  TORCH_CHECK_VALUE(offsets[experts] <= rows, "expert_offsets must end at or below the number of rows ", rows, ", got ",
                    offsets[experts]);
}

void check_token_slot(const at::Tensor& token_slot, int64_t rows) {
  const auto* slots = token_slot.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < token_slot.numel(); ++i)
    TORCH_CHECK_VALUE(slots[i] >= -1 && slots[i] < rows, "token_slot must be between -1 and ", rows - 1, ", got ",
                      slots[i], " at pair ", i);
}

Plan read_plan(const at::Tensor& slot_index, const at::Tensor& token_slot, const at::Tensor& expert_offsets) {
  Plan plan{slot_index.const_data_ptr<int32_t>(),
            token_slot.const_data_ptr<int32_t>(),
            expert_offsets.const_data_ptr<int32_t>(),
            token_slot.size(0),
            token_slot.size(1),
            expert_offsets.size(0) - 1,
            slot_index.size(0),
            0};
  check_offsets(expert_offsets, plan.slots);
  plan.served = plan.expert_offsets[plan.experts];
  check_token_slot(token_slot, plan.served);
  for (int64_t s = 0; s < plan.served; ++s)
    TORCH_CHECK_VALUE(plan.slot_index[s] >= 0 && plan.slot_index[s] < plan.pairs(), "slot_index must be between 0 and ",
                      plan.pairs() - 1, ", got ", plan.slot_index[s], " at slot ", s);
  return plan;
}

std::vector<RowBlock> row_blocks(const int32_t* expert_offsets, int64_t experts, int64_t longest) {
  std::vector<RowBlock> blocks;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t begin = expert_offsets[e], rows = expert_offsets[e + 1] - begin;
    const int64_t count = (rows + longest - 1) / longest;
    for (int64_t i = 0; i < count; ++i) blocks.push_back({e, begin + rows * i / count, begin + rows * (i + 1) / count});
  }
  return blocks;
}

Columns cut_columns(int64_t blocks, int64_t rows, int64_t columns, int64_t cost) {
  constexpr int64_t kTasks = 128, kTaskCost = 8'000'000;
  if (blocks == 0 || columns == 0) return {columns, std::max<int64_t>(columns, 1), 1};
  // A product of few rows is bound by the weights it streams: there is no width to lose, and the cost is of the stream.
  const bool few = rows < 2 * kFewRows * blocks;
  const int64_t narrowest = few ? 64 : 256, work = std::max(rows, blocks * kFewRows) * columns * cost;
  int64_t count = std::min((kTasks + blocks - 1) / blocks, work / (blocks * kTaskCost) + 1);
  count = std::max<int64_t>(1, std::min(count, columns / narrowest));
  const int64_t width = (((columns + count - 1) / count) + 31) / 32 * 32;
  return {columns, width, (columns + width - 1) / width};
}

}  // namespace fastmoe_cpp::cpu
