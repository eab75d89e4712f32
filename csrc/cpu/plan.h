// A dispatch plan as pointers, checked once: its values index memory.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace fastmoe_cpp::cpu {

struct Plan {
  const int32_t *slot_index, *token_slot, *expert_offsets;
  int64_t tokens, top_k, experts;
  int64_t slots, served;  // P, and expert_offsets[E]: the slots that belong to an expert
  int64_t pairs() const { return tokens * top_k; }
  int64_t token(int64_t slot) const { return slot_index[slot] / top_k; }
};

// Throws a ValueError where an offset falls, or a slot or a pair is out of range.
Plan read_plan(const at::Tensor& slot_index, const at::Tensor& token_slot, const at::Tensor& expert_offsets);
void check_offsets(const at::Tensor& expert_offsets, int64_t rows);
void check_token_slot(const at::Tensor& token_slot, int64_t rows);

// Rows begin .. end of one expert.
struct RowBlock {
  int64_t expert, begin, end;
  int64_t rows() const { return end - begin; }
};

// Every expert's rows in blocks of nearly equal size, none longer than `longest`.
std::vector<RowBlock> row_blocks(const int32_t* expert_offsets, int64_t experts, int64_t longest);

// `columns` cut into `count` ranges of nearly equal width (a multiple of `multiple`, but for the last).
struct Columns {
  int64_t total, width, count;
  int64_t begin(int64_t i) const { return i * width; }
  int64_t end(int64_t i) const { return std::min(total, (i + 1) * width); }
};

// The cut for tasks of (row block, range of columns) where a column costs `cost` multiply-adds a row: enough tasks for
// many threads, none too small to be worth its start or too narrow for the BLAS to run at its rate.
Columns cut_columns(int64_t blocks, int64_t rows, int64_t columns, int64_t cost);

}  // namespace fastmoe_cpp::cpu
