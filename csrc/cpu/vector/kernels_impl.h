// The loops of kernels.h over vectors of FASTMOE_VECTOR_BYTES, in the namespace FASTMOE_INSTRUCTIONS. Included once by
// each of baseline.cpp, avx2.cpp and avx512.cpp, after every other header and under that file's target, so that nothing
// inline from elsewhere is compiled for instructions that the CPU may lack.

namespace fastmoe_cpp::cpu::FASTMOE_INSTRUCTIONS {
namespace {

#define FASTMOE_INLINE inline __attribute__((always_inline))

constexpr int kBytes = FASTMOE_VECTOR_BYTES;

template <typename A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t I __attribute__((vector_size(kBytes)));
  typedef uint32_t U __attribute__((vector_size(kBytes)));
  typedef uint16_t Half __attribute__((vector_size(kBytes / 2)));
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kBytes)));
};
template <typename A>
using V = typename Lanes<A>::V;
using VF = V<float>;
using VI = Lanes<float>::I;
using VU = Lanes<float>::U;
using VH = Lanes<float>::Half;
template <typename A>
constexpr int kWidth = kBytes / int(sizeof(A));

// --- loads and stores: a vector of A from memory of T ---

template <typename A>
FASTMOE_INLINE V<A> splat(A x) {
  return x - V<A>{};
}

template <typename T, typename A = acc_t<T>>
FASTMOE_INLINE V<A> load(const T* p) {
  if constexpr (std::is_same_v<T, A>) {
    V<A> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    VH h;
    __builtin_memcpy(&h, p, sizeof h);
    return (VF)(__builtin_convertvector(h, VU) << 16);
  } else {
#if FASTMOE_VECTOR_BYTES == 64
    return (VF)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FASTMOE_VECTOR_BYTES == 32
    return (VF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    VF v;
    for (int i = 0; i < kWidth<float>; ++i) v[i] = static_cast<float>(p[i]);
    return v;
#endif
  }
}

template <typename T, typename A = acc_t<T>>
FASTMOE_INLINE void store(T* p, V<A> v) {
  if constexpr (std::is_same_v<T, A>) {
    __builtin_memcpy(p, &v, sizeof v);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    // to nearest, ties to even; a NaN stays one
    const VU u = (VU)v;
    const VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const VU bits = (v != v) ? (VU{} + 0x7fc0) : rounded;
    const VH h = __builtin_convertvector(bits, VH);
    __builtin_memcpy(p, &h, sizeof h);
  } else {
#if FASTMOE_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif FASTMOE_VECTOR_BYTES == 32
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth<float>; ++i) p[i] = static_cast<T>(v[i]);
#endif
  }
}

// The last n < width elements of an array; the other lanes are zero, or are not written.
template <typename T, typename A = acc_t<T>>
FASTMOE_INLINE V<A> load_some(const T* p, int64_t n) {
  T padded[kWidth<A>] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
template <typename T, typename A = acc_t<T>>
FASTMOE_INLINE void store_some(T* p, V<A> v, int64_t n) {
  T padded[kWidth<A>];
  store(padded, v);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

template <typename A>
FASTMOE_INLINE A sum(V<A> v) {
  // halves onto halves: a fixed order
  A lanes[kWidth<A>];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = kWidth<A> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// --- curves ---

// exp to about 1 ulp: 2^n * (1 + r + r^2 p(r)), |r| <= ln(2) / 2; the polynomial is our own minimax fit.
FASTMOE_INLINE VF exp(VF x) {
  x = x > 89.0f ? splat(89.0f) : x;
  x = x < -104.0f ? splat(-104.0f) : x;
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const VF shifted = x * 1.44269504f + magic;
  const VI n = (VI)shifted - (VI)magic;
  const VF steps = shifted - magic;
  const VF r = (x - steps * 0.693145752f) - steps * 1.42860677e-6f;
  VF p = splat(0.0013901347f);
  p = p * r + 0.0083633f;
  p = p * r + 0.041666855f;
  p = p * r + 0.16666576f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  // in two factors, so that results below 2^-126 and above 2^127 come out right
  const VI first = n >> 1, second = n - first;
  return p * (VF)((first + 127) << 23) * (VF)((second + 127) << 23);
}
FASTMOE_INLINE V<double> exp(V<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <typename A>
FASTMOE_INLINE V<A> sigmoid(V<A> x) {
  return A(1) / (A(1) + exp(-x));
}

// The normal distribution's cdf, given e = exp(-x^2 / 2). float: erfc(z) exp(z^2) = t p(t), t = 1 / (1 + 0.4 z), with
// our own minimax fit of p (relative error 8e-9).
FASTMOE_INLINE VF normal_cdf(VF x, VF e) {
  const VF z = (x < 0.0f ? -x : x) * 0.70710678f;
  const VF t = 1.0f / (1.0f + 0.4f * z);
  VF p = splat(-0.029594338f);
  p = p * t + 0.19801322f;
  p = p * t - 0.49881151f;
  p = p * t + 0.54743545f;
  p = p * t - 0.28436669f;
  p = p * t + 0.27206623f;
  p = p * t + 0.12967960f;
  p = p * t + 0.21491910f;
  p = p * t + 0.22495202f;
  p = p * t + 0.22570691f;
  const VF tail = 0.5f * e * t * p;
  return x < 0.0f ? tail : 1.0f - tail;
}
FASTMOE_INLINE V<double> normal_cdf(V<double> x, V<double>) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

template <typename A>
struct Curve {
  V<A> value, slope;
};

// As fastmoe_cpp::curve in activation.h.
template <Activation F, typename A>
FASTMOE_INLINE Curve<A> curve(V<A> x, A alpha) {
  if constexpr (F == Activation::SwiGLU || F == Activation::SiLU || F == Activation::ClampedSwiGLU) {
    const A a = F == Activation::ClampedSwiGLU ? alpha : A(1);
    const V<A> s = sigmoid<A>(a * x);
    return {x * s, s * (A(1) + a * x * (A(1) - s))};
  } else if constexpr (F == Activation::GeGLU || F == Activation::GELU) {
    const V<A> e = exp(A(-0.5) * x * x), cdf = normal_cdf(x, e);
    return {x * cdf, cdf + A(0.39894228040143267794) * x * e};
  } else if constexpr (F == Activation::GeGLUTanh || F == Activation::GELUTanh) {
    // (1 + tanh(u)) / 2 is sigmoid(2u)
    const A c = A(0.79788456080286535588), k = A(0.044715);
    const V<A> s = sigmoid<A>(A(2) * c * (x + k * x * x * x));
    return {x * s, s + A(2) * x * s * (A(1) - s) * c * (A(1) + A(3) * k * x * x)};
  } else {
    // the slope where the rectifier is on; see through()
    const V<A> zero = splat(A(0));
    const V<A> r = x <= zero ? zero : x;  // a NaN stays one
    if constexpr (F == Activation::ReGLU || F == Activation::ReLU) return {r, splat(A(1))};
    return {r * r, A(2) * r};
  }
}

template <Activation F, typename A>
FASTMOE_INLINE V<A> value_of(V<A> gate, V<A> up, A alpha, A limit) {
  if constexpr (F == Activation::ClampedSwiGLU) {
    gate = gate > limit ? splat(limit) : gate;
    up = up > limit ? splat(limit) : (up < -limit ? splat(-limit) : up);
    return curve<F, A>(gate, alpha).value * (up + A(1));
  } else if constexpr (is_gated(F)) {
    return curve<F, A>(gate, alpha).value * up;
  } else {
    return curve<F, A>(gate, alpha).value;
  }
}

template <typename A>
struct Gradients {
  V<A> value, gate, up;
};

// A rectifier that is off passes nothing, not 0 * NaN.
template <Activation F, typename A>
FASTMOE_INLINE V<A> through(V<A> gate, V<A> grad) {
  const V<A> zero = splat(A(0));
  if constexpr (F == Activation::ReGLU || F == Activation::ReLU || F == Activation::ReLU2)
    return gate <= zero ? zero : grad;
  return grad;
}

template <Activation F, typename A>
FASTMOE_INLINE Gradients<A> gradients_of(V<A> gate, V<A> up, V<A> grad, A alpha, A limit) {
  const V<A> zero = splat(A(0));
  if constexpr (F == Activation::ClampedSwiGLU) {
    const auto gate_clamped = gate > limit, up_high = up > limit, up_low = up < -limit;
    const auto c = curve<F, A>(gate_clamped ? splat(limit) : gate, alpha);
    const V<A> shifted = (up_high ? splat(limit) : (up_low ? splat(-limit) : up)) + A(1);
    return {c.value * shifted, gate_clamped ? zero : grad * shifted * c.slope,
            up_high ? zero : (up_low ? zero : grad * c.value)};
  } else if constexpr (is_gated(F)) {
    const auto c = curve<F, A>(gate, alpha);
    return {c.value * up, through<F, A>(gate, grad * up * c.slope), grad * c.value};
  } else {
    const auto c = curve<F, A>(gate, alpha);
    return {c.value, through<F, A>(gate, grad * c.slope), zero};
  }
}

// --- the loops ---

template <Activation F, typename A>
void activate(int64_t n, const A* gate, const A* up, A* value, A alpha, A limit) {
  constexpr int w = kWidth<A>;
  int64_t i = 0;
  for (; i + w <= n; i += w)
    store(value + i, value_of<F, A>(load(gate + i), is_gated(F) ? load(up + i) : splat(A(0)), alpha, limit));
  if (i < n) {
    const V<A> u = is_gated(F) ? load_some(up + i, n - i) : splat(A(0));
    store_some(value + i, value_of<F, A>(load_some(gate + i, n - i), u, alpha, limit), n - i);
  }
}

template <Activation F, typename A>
A activate_backward(int64_t n, const A* gate, const A* up, const A* grad, A weight, A* value, A* grad_gate, A* grad_up,
                    A alpha, A limit) {
  constexpr int w = kWidth<A>;
  V<A> dot = splat(A(0));
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    const V<A> dv = load(grad + i), u = is_gated(F) ? load(up + i) : splat(A(0));
    const auto g = gradients_of<F, A>(load(gate + i), u, weight * dv, alpha, limit);
    dot += dv * g.value;
    store(value + i, weight * g.value);
    store(grad_gate + i, g.gate);
    if constexpr (is_gated(F)) store(grad_up + i, g.up);
  }
  if (i < n) {
    const V<A> dv = load_some(grad + i, n - i), u = is_gated(F) ? load_some(up + i, n - i) : splat(A(0));
    const auto g = gradients_of<F, A>(load_some(gate + i, n - i), u, weight * dv, alpha, limit);
    // the lanes past the end are f(0) = 0, with a gradient of 0
    dot += dv * g.value;
    store_some(value + i, weight * g.value, n - i);
    store_some(grad_gate + i, g.gate, n - i);
    if constexpr (is_gated(F)) store_some(grad_up + i, g.up, n - i);
  }
  return sum<A>(dot);
}

template <typename T, typename A = acc_t<T>>
void load_scaled(int64_t n, const T* x, A scale, A* y) {
  constexpr int w = kWidth<A>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(y + i, scale * load(x + i));
  if (i < n) store_some(y + i, scale * load_some(x + i, n - i), n - i);
}

template <typename T, typename A = acc_t<T>>
void store_all(int64_t n, const A* x, T* y) {
  constexpr int w = kWidth<A>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(y + i, load(x + i));
  if (i < n) store_some(y + i, load_some(x + i, n - i), n - i);
}

template <typename T, typename A = acc_t<T>>
void weighted_sum(int64_t n, int64_t count, const T* const* rows, const A* weights, T* out) {
  constexpr int w = kWidth<A>;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    V<A> s[4] = {};
    for (int64_t j = 0; j < count; ++j)
      for (int u = 0; u < 4; ++u) s[u] += weights[j] * load(rows[j] + i + u * w);
    for (int u = 0; u < 4; ++u) store(out + i + u * w, s[u]);
  }
  for (; i < n; i += w) {
    const int64_t left = n - i;
    V<A> s = {};
    for (int64_t j = 0; j < count; ++j)
      s += weights[j] * (left >= w ? load(rows[j] + i) : load_some(rows[j] + i, left));
    if (left >= w)
      store(out + i, s);
    else
      store_some(out + i, s, left);
  }
}

template <typename T, typename A = acc_t<T>>
A dot(int64_t n, const T* x, const T* y) {
  constexpr int w = kWidth<A>;
  V<A> s[4] = {};
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int u = 0; u < 4; ++u) s[u] += load(x + i + u * w) * load(y + i + u * w);
  for (; i + w <= n; i += w) s[0] += load(x + i) * load(y + i);
  if (i < n) s[1] += load_some(x + i, n - i) * load_some(y + i, n - i);
  return sum<A>((s[0] + s[1]) + (s[2] + s[3]));
}

template <typename A>
A exp_and_sum(int64_t n, const A* x, A shift, A* y) {
  constexpr int w = kWidth<A>;
  V<A> s = {};
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    const V<A> e = exp(load(x + i) - shift);
    store(y + i, e);
    s += e;
  }
  A rest = 0;
  if (i < n) {
    store_some(y + i, exp(load_some(x + i, n - i) - shift), n - i);
    for (; i < n; ++i) rest += y[i];
  }
  return sum<A>(s) + rest;
}

// M rows of x against four rows of w at a time; the sums stay in registers. Every sum runs over k in the same order
// whatever M is and wherever w's row stands.
template <int M, int N, typename T, typename A = acc_t<T>>
FASTMOE_INLINE void row_block(int64_t k, const A* x, int64_t ldx, const T* w, int64_t ldw, A* y, int64_t ldy) {
  constexpr int width = kWidth<A>;
  V<A> s[M][N] = {};
  int64_t i = 0;
  for (; i + width <= k; i += width) {
    V<A> b[N];
    for (int c = 0; c < N; ++c) b[c] = load(w + c * ldw + i);
    for (int r = 0; r < M; ++r) {
      const V<A> a = load(x + r * ldx + i);
      for (int c = 0; c < N; ++c) s[r][c] += a * b[c];
    }
  }
  if (i < k) {
    V<A> b[N];
    for (int c = 0; c < N; ++c) b[c] = load_some(w + c * ldw + i, k - i);
    for (int r = 0; r < M; ++r) {
      const V<A> a = load_some(x + r * ldx + i, k - i);
      for (int c = 0; c < N; ++c) s[r][c] += a * b[c];
    }
  }
  for (int r = 0; r < M; ++r)
    for (int c = 0; c < N; ++c) y[r * ldy + c] = sum<A>(s[r][c]);
}

template <int M, typename T, typename A = acc_t<T>>
void row_strip(int64_t n, int64_t k, const A* x, int64_t ldx, const T* w, int64_t ldw, A* y, int64_t ldy) {
  constexpr int N = 4;
  int64_t j = 0;
  for (; j + N <= n; j += N) row_block<M, N>(k, x, ldx, w + j * ldw, ldw, y + j, ldy);
  for (; j < n; ++j) row_block<M, 1>(k, x, ldx, w + j * ldw, ldw, y + j, ldy);
}

template <typename T, typename A = acc_t<T>>
void few_rows(int64_t m, int64_t n, int64_t k, const A* x, int64_t ldx, const T* w, int64_t ldw, A* y, int64_t ldy) {
  // as many rows at once as the registers hold: 32 of them with AVX-512, 16 otherwise
  constexpr int kMost = kBytes == 64 ? 6 : 2;
  // rows of w that stay in the first-level cache while the rows of x go by
  const int64_t strip = std::max<int64_t>(4, (int64_t(16384) / (k * int64_t(sizeof(T)) + 1)) & ~int64_t(3));
  for (int64_t j = 0; j < n; j += strip) {
    const int64_t columns = std::min(strip, n - j);
    for (int64_t r = 0; r < m;) {
      const auto go = [&](auto rows) {
        row_strip<rows()>(columns, k, x + r * ldx, ldx, w + j * ldw, ldw, y + r * ldy + j, ldy);
        r += rows();
      };
      const int64_t left = m - r;
      if constexpr (kMost == 6) {
        if (left >= 6) {
          go(std::integral_constant<int, 6>());
          continue;
        }
        if (left >= 4) {
          go(std::integral_constant<int, 4>());
          continue;
        }
        if (left == 3) {
          go(std::integral_constant<int, 3>());
          continue;
        }
      }
      if (left >= 2)
        go(std::integral_constant<int, 2>());
      else
        go(std::integral_constant<int, 1>());
    }
  }
}

template <typename A, int... F>
void fill_activations(ActivationKernels<A>* out, std::integer_sequence<int, F...>) {
  ((out[F] = {activate<static_cast<Activation>(F), A>, activate_backward<static_cast<Activation>(F), A>}), ...);
}

#undef FASTMOE_INLINE

}  // namespace

template <typename T>
const Kernels<T>& kernels() {
  using A = acc_t<T>;
  static const Kernels<T> k = [] {
    Kernels<T> set{};
    fill_activations<A>(set.activation, std::make_integer_sequence<int, static_cast<int>(Activation::Count)>());
    set.load = load_scaled<T>;
    set.store = store_all<T>;
    set.weighted_sum = weighted_sum<T>;
    set.dot = dot<T>;
    set.exp = exp_and_sum<A>;
    set.few_rows = few_rows<T>;
    return set;
  }();
  return k;
}
template const Kernels<double>& kernels<double>();
template const Kernels<float>& kernels<float>();
template const Kernels<c10::BFloat16>& kernels<c10::BFloat16>();
template const Kernels<c10::Half>& kernels<c10::Half>();

}  // namespace fastmoe_cpp::cpu::FASTMOE_INSTRUCTIONS
