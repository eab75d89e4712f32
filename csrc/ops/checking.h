// The vocabulary the checks are written in.
#pragma once
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include "checks.h"

namespace fastmoe_cpp::checking {

// A tensor with the name its user knows it by.
struct Arg {
  const Tensor& t;
  const char* name;
  c10::SymInt size(int64_t d) const { return t.sym_size(d); }
};

inline void defined(const Arg& a) { TORCH_CHECK_VALUE(a.t.defined(), a.name, " must be a tensor, got None"); }

// `contract` is the shape in the words of library.cpp, such as "[T, H]".
inline void dims(const Arg& a, int64_t n, const char* contract) {
  defined(a);
  TORCH_CHECK_VALUE(a.t.dim() == n, a.name, " must have shape ", contract, ", got ", a.t.sym_sizes());
}

inline void size_is(const Arg& a, int64_t d, const c10::SymInt& expected, const char* contract) {
  const auto equal = a.size(d).sym_eq(expected);
  // TORCH_SYM_CHECK raises RuntimeError; a wrong shape known by now is a ValueError like every other bad value.
  if (auto known = equal.maybe_as_bool()) {
    TORCH_CHECK_VALUE(*known, a.name, " must have shape ", contract, " with size ", expected, " in dimension ", d,
                      ", got ", a.t.sym_sizes());
  } else {
    TORCH_SYM_CHECK(equal, a.name, " must have shape ", contract);
  }
}

inline void floating(const Arg& a) {
  const auto s = a.t.scalar_type();
  TORCH_CHECK_TYPE(s == at::kDouble || s == at::kFloat || s == at::kBFloat16 || s == at::kHalf, a.name,
                   " must be float64, float32, bfloat16 or float16, got ", s);
}

inline void dtype_is(const Arg& a, at::ScalarType expected, const char* why) {
  TORCH_CHECK_TYPE(a.t.scalar_type() == expected, a.name, " must be ", expected, " (", why, "), got ",
                   a.t.scalar_type());
}

inline void index_type(const Arg& a) {
  TORCH_CHECK_TYPE(a.t.scalar_type() == at::kInt || a.t.scalar_type() == at::kLong, a.name,
                   " must be int32 or int64, got ", a.t.scalar_type());
}

inline void same_device(const Arg& a, const Arg& b) {
  TORCH_CHECK_VALUE(a.t.device() == b.t.device(), a.name, " must be on ", b.t.device(), " as ", b.name, " is, got ",
                    a.t.device());
}

inline void at_least(const c10::SymInt& value, int64_t low, const char* name) {
  const auto ok = value.sym_ge(low);
  if (auto known = ok.maybe_as_bool()) {
    TORCH_CHECK_VALUE(*known, name, " must be at least ", low, ", got ", value);
  } else {
    TORCH_SYM_CHECK(ok, name, " must be at least ", low);
  }
}

// How many slots a plan has is the caller's choice where not every pair is served: P of at most T * K.
inline void number_of_slots(const c10::SymInt& slots, const Arg& token_slot, const char* name) {
  const auto pairs = token_slot.size(0) * token_slot.size(1);
  const auto ok = slots.sym_le(pairs);
  if (auto known = ok.maybe_as_bool()) {
    TORCH_CHECK_VALUE(*known, name, " must have at most T * K = ", pairs, " slots for token_slot [T, K], got ", slots);
  } else {
    TORCH_SYM_CHECK(ok, name, " must have at most T * K slots for token_slot [T, K]");
  }
}

inline void padding(const OptionalTensor& mask, const Arg& like, int64_t n, const char* contract) {
  if (!has(mask)) return;
  const Arg m{*mask, "padding_mask"};
  dims(m, n, contract);
  for (int64_t d = 0; d < n; ++d) size_is(m, d, like.size(d), contract);
  dtype_is(m, at::kBool, "True marks padding");
  same_device(m, like);
}

// The three tensors of a plan against each other. Returns nothing: T and K are token_slot's sizes, P slot_index's.
inline void plan(const Arg& slot_index, const Arg& token_slot, const Arg& expert_offsets, const Arg& like) {
  dims(token_slot, 2, "[T, K]");
  dims(slot_index, 1, "[P]");
  dims(expert_offsets, 1, "[E + 1]");
  at_least(expert_offsets.size(0) - 1, 1, "the number of experts, one less than the size of expert_offsets,");
  number_of_slots(slot_index.size(0), token_slot, slot_index.name);
  for (const Arg* a : {&slot_index, &token_slot, &expert_offsets}) {
    dtype_is(*a, at::kInt, "as dispatch returns it");
    same_device(*a, like);
    TORCH_CHECK_VALUE(a->t.is_contiguous(), a->name, " must be contiguous, as dispatch returns it, got strides ",
                      a->t.sym_strides());
  }
}

}  // namespace fastmoe_cpp::checking
