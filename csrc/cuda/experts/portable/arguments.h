// What a kernel of this path is given: plain values, the same struct for every kind of product.
#pragma once
#include <cstdint>

#include "../experts.h"

namespace fastmoe_cpp::cuda::portable {

// n / divisor for 0 <= n < 2^31, by a multiplication (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t multiplier;
  int shift;  // -1: the divisor is 1

  Divider() = default;
  explicit Divider(uint32_t divisor) {
    int bits = 0;
    while ((uint64_t{1} << bits) < divisor) ++bits;
    shift = bits - 1;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + divisor - 1) / divisor);
  }
  FASTMOE_HOST_DEVICE int operator()(int n) const {
    if (shift < 0) return n;
    return static_cast<int>(((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> 32) >> shift);
  }
};

struct Arguments {
  const int32_t* expert_offsets;  // [experts + 1]
  int experts;

  // An operand of slots' rows: row s of it, or of token(s) where it is gathered.
  const int32_t* slot_index;
  Divider top_k;
  bool gather_a, gather_b;

  const void *a, *b;
  int a_stride, b_stride;    // elements
  int64_t b_expert;          // elements from one expert's weight to the next; 0 in weight_grad
  int rows;                  // weight_grad: output rows
  int columns, contraction;  // weight_grad contracts over slots
  int alternate;             // I where the weight's 2I gate and up rows alternate, else 0
  bool gated;                // up, act_grad

  const void* weights;  // [T * K], scales of slots; null: none
  const void* bias;     // up: [E, up_rows], linear: [E, columns]; or null

  void* out;          // up: act [P, I]; linear, linear_grad: rows [P, columns]; act_grad: scaled_act; weight_grad: grad
  void* pre;          // up: pre_activation, written; act_grad: read
  void* grad_pre;     // act_grad
  void* partial_dot;  // act_grad: [ceil(I / 64), P], <dA, A> over 64 columns
  int64_t slots;      // P

  Activation activation;
  double alpha, limit;
};

// Row r of a weight whose first half of rows and second half alternate in memory.
FASTMOE_HOST_DEVICE int weight_row(int r, int alternate) {
  if (!alternate) return r;
  return r < alternate ? 2 * r : 2 * (r - alternate) + 1;
}

}  // namespace fastmoe_cpp::cuda::portable
