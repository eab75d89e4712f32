// The activations between the two projections, for host and device alike. No torch here.
#pragma once
#include <cmath>
#include <string_view>

#if defined(__CUDACC__)
#define FASTMOE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTMOE_HOST_DEVICE inline
#endif

namespace fastmoe_cpp {

enum class Activation : int {
  SwiGLU,
  GeGLU,
  GeGLUTanh,
  ReGLU,
  ClampedSwiGLU,
  SiLU,
  GELU,
  GELUTanh,
  ReLU,
  ReLU2,
  Count
};

inline constexpr std::string_view kActivationNames[] = {"swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu",
                                                        "silu",   "gelu",  "gelu_tanh",  "relu",  "relu2"};

FASTMOE_HOST_DEVICE constexpr bool is_gated(Activation a) { return a <= Activation::ClampedSwiGLU; }

namespace activation_detail {
FASTMOE_HOST_DEVICE float exp_(float x) { return expf(x); }
FASTMOE_HOST_DEVICE double exp_(double x) { return ::exp(x); }
FASTMOE_HOST_DEVICE float erf_(float x) { return erff(x); }
FASTMOE_HOST_DEVICE double erf_(double x) { return ::erf(x); }
FASTMOE_HOST_DEVICE float tanh_(float x) { return tanhf(x); }
FASTMOE_HOST_DEVICE double tanh_(double x) { return ::tanh(x); }
template <typename T>
FASTMOE_HOST_DEVICE T sigmoid(T x) {
  return T(1) / (T(1) + exp_(-x));
}
}  // namespace activation_detail

template <typename T>
struct ValueAndSlope {
  T value, slope;
};

// The one-argument curve of an activation (of the gate, where it is gated) and its derivative.
template <Activation A, typename T>
FASTMOE_HOST_DEVICE ValueAndSlope<T> curve(T x, T alpha) {
  using namespace activation_detail;
  if constexpr (A == Activation::SwiGLU || A == Activation::SiLU || A == Activation::ClampedSwiGLU) {
    const T a = A == Activation::ClampedSwiGLU ? alpha : T(1);
    const T s = sigmoid(a * x);
    return {x * s, s * (T(1) + a * x * (T(1) - s))};
  } else if constexpr (A == Activation::GeGLU || A == Activation::GELU) {
    const T cdf = T(0.5) * (T(1) + erf_(x * T(0.70710678118654752440)));
    const T pdf = T(0.39894228040143267794) * exp_(T(-0.5) * x * x);
    return {x * cdf, cdf + x * pdf};
  } else if constexpr (A == Activation::GeGLUTanh || A == Activation::GELUTanh) {
    const T c = T(0.79788456080286535588), k = T(0.044715);
    const T th = tanh_(c * (x + k * x * x * x));
    return {T(0.5) * x * (T(1) + th),
            T(0.5) * (T(1) + th) + T(0.5) * x * (T(1) - th * th) * c * (T(1) + T(3) * k * x * x)};
  } else if constexpr (A == Activation::ReGLU || A == Activation::ReLU) {
    // x != x keeps a NaN a NaN, as torch.relu does
    return {x > T(0) || x != x ? x : T(0), x > T(0) ? T(1) : T(0)};
  } else {
    const T r = x > T(0) || x != x ? x : T(0);
    return {r * r, T(2) * r};
  }
}

template <Activation A, typename T>
FASTMOE_HOST_DEVICE T activate(T gate, T up, T alpha, T limit) {
  if constexpr (A == Activation::ClampedSwiGLU) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : (up < -limit ? -limit : up);
    return curve<A, T>(gate, alpha).value * (up + T(1));
  } else if constexpr (is_gated(A)) {
    return curve<A, T>(gate, alpha).value * up;
  } else {
    return curve<A, T>(gate, alpha).value;
  }
}

template <typename T>
struct ActivationGrad {
  T value, grad_gate, grad_up;  // grad_up is 0 where the activation is not gated
};

// The value again and the gradients of gate and up for a given gradient of the value. Clamped entries get no gradient.
template <Activation A, typename T>
FASTMOE_HOST_DEVICE ActivationGrad<T> activate_backward(T gate, T up, T grad, T alpha, T limit) {
  if constexpr (A == Activation::ClampedSwiGLU) {
    const bool gate_passes = !(gate > limit), up_passes = !(up > limit || up < -limit);
    gate = gate_passes ? gate : limit;
    up = up > limit ? limit : (up < -limit ? -limit : up);
    const auto c = curve<A, T>(gate, alpha);
    return {c.value * (up + T(1)), gate_passes ? grad * (up + T(1)) * c.slope : T(0),
            up_passes ? grad * c.value : T(0)};
  } else if constexpr (is_gated(A)) {
    const auto c = curve<A, T>(gate, alpha);
    return {c.value * up, grad * up * c.slope, grad * c.value};
  } else {
    const auto c = curve<A, T>(gate, alpha);
    return {c.value, grad * c.slope, T(0)};
  }
}

}  // namespace fastmoe_cpp
