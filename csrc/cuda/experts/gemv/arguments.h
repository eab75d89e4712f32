// What the kernels are given: plain values, the same struct for all.
#pragma once
#include <cstdint>

#include "gemv.h"

namespace fastmoe_cpp::cuda::gemv {

enum class Kind : int { gated_up, plain_up, down, combined_down };

struct Arguments {
  const int32_t *slot_index, *expert_offsets;
  int experts, top_k;
  bool reads_ahead;  // the plan and the weights may be read before the preceding kernel has ended

  const void *rows, *weight, *bias;  // up: x [T, k]; down: act [P, k]; [E, weight_rows, k]; [E, weight_rows] or null
  int k, columns;                    // columns: of the result, I or H; weight_rows is twice as many where gated
  bool interleaved;

  const float* scale;  // routing weights [T, K], or null; of up, and of combined_down
  void *pre, *out;     // up: [P, weight_rows] or null; act [P, columns] or null; down: [P, columns]

  const int32_t* token_slot;  // [K], of combined_down, whose out is [1, columns]
  Activation activation;
  float alpha, limit;
};

}  // namespace fastmoe_cpp::cuda::gemv
