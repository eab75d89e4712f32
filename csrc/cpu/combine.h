#pragma once
#include "plan.h"

namespace fastmoe_cpp::cpu {

// out [T, H]: out[t] = sum over k in order of weights[t, k] * rows[token_slot[t, k]], -1 left out. No weights: ones.
template <typename T, typename A>
void combine_rows(int64_t tokens, int64_t top_k, int64_t hidden, const T* rows, const int32_t* token_slot,
                  const A* weights, T* out);

}  // namespace fastmoe_cpp::cpu
