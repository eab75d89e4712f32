// Inner loops over contiguous arrays, compiled for several instruction sets. `kernels<T>()` is the set that suits this
// CPU (torch's choice, so that ATEN_CPU_CAPABILITY holds here too). T is what is stored, A = acc_t<T> what is computed in.
// A loop's result depends on its arguments alone, never on where in an array an element stands.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../../activation.h"

namespace fastmoe_cpp::cpu {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
struct ActivationKernels {
  // value[i] = f(gate[i], up[i]); up is not read where the activation is not gated.
  void (*forward)(int64_t n, const A* gate, const A* up, A* value, A alpha, A limit);
  // For the gradient `grad` of f: value[i] = weight * f, grad_gate[i] and grad_up[i] = weight * grad[i] * df/dgate and
  // df/dup. Returns sum of grad[i] * f. Outputs may be the inputs; grad_up is not written where there is no up.
  A (*backward)(int64_t n, const A* gate, const A* up, const A* grad, A weight, A* value, A* grad_gate, A* grad_up,
                A alpha, A limit);
};

// Up to how many rows `few_rows` serves better than a general GEMM.
inline constexpr int64_t kFewRows = 16;

template <typename T>
struct Kernels {
  using A = acc_t<T>;
  ActivationKernels<A> activation[static_cast<int>(Activation::Count)];
  // y[i] = scale * x[i]
  void (*load)(int64_t n, const T* x, A scale, A* y);
  void (*store)(int64_t n, const A* x, T* y);
  // out[i] = sum over j in order of weights[j] * rows[j][i]
  void (*weighted_sum)(int64_t n, int64_t count, const T* const* rows, const A* weights, T* out);
  A (*dot)(int64_t n, const T* x, const T* y);
  // y[i] = exp(x[i] - shift); returns their sum
  A (*exp)(int64_t n, const A* x, A shift, A* y);
  // y [m, n] = x [m, k] @ w [n, k].T for m <= kFewRows: streams w once.
  void (*few_rows)(int64_t m, int64_t n, int64_t k, const A* x, int64_t ldx, const T* w, int64_t ldw, A* y,
                   int64_t ldy);
};

template <typename T>
const Kernels<T>& kernels();

// One set an instruction set, each in the file of its name.
namespace baseline {
template <typename T>
const Kernels<T>& kernels();
}
namespace avx2 {
template <typename T>
const Kernels<T>& kernels();
}
namespace avx512 {
template <typename T>
const Kernels<T>& kernels();
}

}  // namespace fastmoe_cpp::cpu
