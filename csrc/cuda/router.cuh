// One token's row of E experts in the registers of one warp: lane l owns the N experts from l * N on.
// Because a lane's experts are neighbours, the lowest lane that holds a key also holds the lowest id that has it.
#pragma once
#include "device.cuh"
#include "router.h"

namespace fastmoe_cpp::cuda {

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float sqrt_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double sqrt_of(double x) { return sqrt(x); }

// Elements of a row of T that a lane moves at once: its N, or as many as 16 bytes hold.
template <typename T, int N>
inline constexpr int kRowVector = N < kVector<T> ? N : kVector<T>;

// `wide`: E is a multiple of the vector and rows start on one, so that a vector is inside the row or outside.
// Places past the row read as -inf, which no score function and no maximum notices.
template <int N, typename T>
__device__ __forceinline__ void load_mine(const T* row, int first, int experts, bool wide, Acc<T> (&out)[N]) {
  constexpr int V = kRowVector<T, N>;
  if (wide) {
#pragma unroll
    for (int i = 0; i < N; i += V) {
      Vec<T, V> x{};
      const bool inside = first + i < experts;
      if (inside) x = *reinterpret_cast<const Vec<T, V>*>(row + first + i);
#pragma unroll
      for (int v = 0; v < V; ++v) out[i + v] = inside ? to_acc(x.v[v]) : -Acc<T>(INFINITY);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = first + i < experts ? to_acc(row[first + i]) : -Acc<T>(INFINITY);
  }
}

template <int N, typename T>
__device__ __forceinline__ void store_mine(T* row, int first, int experts, bool wide, const Acc<T> (&in)[N]) {
  constexpr int V = kRowVector<T, N>;
  if (wide) {
#pragma unroll
    for (int i = 0; i < N; i += V) {
      Vec<T, V> x;
#pragma unroll
      for (int v = 0; v < V; ++v) x.v[v] = from_acc<T>(in[i + v]);
      if (first + i < experts) *reinterpret_cast<Vec<T, V>*>(row + first + i) = x;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (first + i < experts) row[first + i] = from_acc<T>(in[i]);
  }
}

template <typename A>
__device__ __forceinline__ A elementwise_score(Score f, A x) {
  if (f == Score::sigmoid) return A(1) / (A(1) + exp_of(-x));
  return sqrt_of((x > A(0) ? x : A(0)) + log1p_of(exp_of(x > A(0) ? -x : x)));
}

// d score / d logit of an elementwise score.
template <typename A>
__device__ __forceinline__ A score_slope(Score f, A x, A score) {
  if (f == Score::sigmoid) return score * (A(1) - score);
  return score == A(0) ? A(0) : A(0.5) / (score * (A(1) + exp_of(-x)));
}

// The scores of a row. A NaN logit is left out of softmax's maximum and sum, so that the row's other keys stay usable;
// returns whether there was one (softmax only), and the caller makes the row NaN.
template <typename A, int N>
__device__ __forceinline__ bool score_row(Score f, const A (&logit)[N], A (&score)[N]) {
  if (f != Score::softmax) {
#pragma unroll
    for (int i = 0; i < N; ++i) score[i] = elementwise_score(f, logit[i]);
    return false;
  }
  A top = -A(INFINITY), sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) top = fmax(top, logit[i]);
  top = warp_max_number(top);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += score[i] = exp_of(logit[i] - top);
  sum = warp_sum(sum);
  bool nan = false;
  if (sum != sum) {
    sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool number = logit[i] == logit[i];
      nan |= !number;
      sum += number ? score[i] : A(0);
    }
    sum = warp_sum(sum);
    nan = __any_sync(kAllLanes, nan);
  }
  const A scale = A(1) / sum;
#pragma unroll
  for (int i = 0; i < N; ++i) score[i] *= scale;
  return nan;
}

template <typename A, int N>
__device__ __forceinline__ void fill(A (&x)[N], A value) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = value;
}

template <typename K>
__device__ __forceinline__ void order_pair(K& a, K& b, unsigned& place_a, unsigned& place_b) {
  const bool swap = b > a || (b == a && place_b < place_a);
  const K high = swap ? b : a, low = swap ? a : b;
  const unsigned place_high = swap ? place_b : place_a, place_low = swap ? place_a : place_b;
  a = high, b = low, place_a = place_high, place_b = place_low;
}

// chosen[0 .. top_k) = the ids of the largest keys, downwards, ties to the lower id. Keys are ordered (device.cuh), 0
// for places past the row. Each lane sorts its keys in runs of up to 4; a round then compares the heads of the runs and
// only the winner moves: no lane searches its N keys again.
template <typename A, int N>
__device__ __forceinline__ void select_top(const Key<A> (&key)[N], int top_k, int16_t* chosen) {
  constexpr int W = N < 4 ? N : 4, Q = N / W;
  Key<A> run[Q][W];
  unsigned places[Q];  // of a run's keys among the lane's N, 8 bits each, the head's lowest
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    unsigned place[W];
#pragma unroll
    for (int w = 0; w < W; ++w) run[q][w] = key[q * W + w], place[w] = q * W + w;
    if constexpr (W == 4) {
      order_pair(run[q][0], run[q][1], place[0], place[1]);
      order_pair(run[q][2], run[q][3], place[2], place[3]);
      order_pair(run[q][0], run[q][2], place[0], place[2]);
      order_pair(run[q][1], run[q][3], place[1], place[3]);
      order_pair(run[q][1], run[q][2], place[1], place[2]);
    } else if constexpr (W == 2) {
      order_pair(run[q][0], run[q][1], place[0], place[1]);
    }
    places[q] = 0;
#pragma unroll
    for (int w = 0; w < W; ++w) places[q] |= place[w] << (8 * w);
  }
  const int lane = lane_id();
  for (int k = 0; k < top_k; ++k) {
    Key<A> best = run[0][0];
    int winner = 0;
    unsigned place = places[0];
#pragma unroll
    for (int q = 1; q < Q; ++q)
      if (run[q][0] > best) best = run[q][0], winner = q, place = places[q];
    const unsigned holders = __ballot_sync(kAllLanes, best == warp_max(best));
    if (lane == __ffs(holders) - 1) {
      chosen[k] = static_cast<int16_t>(lane * N + (place & 0xff));
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        if (q != winner) continue;
#pragma unroll
        for (int w = 0; w + 1 < W; ++w) run[q][w] = run[q][w + 1];
        run[q][W - 1] = 0;
        places[q] >>= 8;
      }
    }
  }
}

// The weights of a token's K selected experts, by a whole warp. id_of(k) is an expert or -1; scores are those of the
// row and row its logits.
template <typename A, typename T, typename IdOf>
struct Selected {
  const Weighting& w;
  const A* scores;
  const T* row;
  A top = -A(INFINITY), scale = 1, total = 1;

  __device__ Selected(const Weighting& w, int top_k, IdOf id_of, const A* scores, const T* row)
      : w(w), scores(scores), row(row) {
    const auto sum_over = [&](auto&& term) {
      A sum = 0;
      for (int k = lane_id(); k < top_k; k += kWarp)
        if (const int id = id_of(k); id >= 0) sum += term(id);
      return warp_sum(sum);
    };
    if (w.after_topk && w.score == Score::softmax) {
      A mine = -A(INFINITY);
      for (int k = lane_id(); k < top_k; k += kWarp)
        if (const int id = id_of(k); id >= 0) mine = fmax(mine, to_acc(row[id]));
      top = warp_max_number(mine);
      scale = A(1) / sum_over([&](int id) { return exp_of(to_acc(row[id]) - top); });
    }
    if (w.renormalize) total = sum_over([&](int id) { return value(id); }) + A(w.epsilon);
  }

  // before renormalisation
  __device__ A value(int id) const {
    if (!w.after_topk) return scores[id];
    if (w.score == Score::softmax) return exp_of(to_acc(row[id]) - top) * scale;
    return elementwise_score(w.score, to_acc(row[id]));
  }
  __device__ A weight(A value) const { return value / total * A(w.scaling); }
};

}  // namespace fastmoe_cpp::cuda
