// One token's choice by one warp: scores, selection, weights.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "router.cuh"

namespace fastmoe_cpp::cuda {

// Offsets into one warp's shared memory, in bytes; experts a group.
struct RouteLayout {
  int values, keys, groups, chosen, kept, group_size, bytes = 0;
  int take(int64_t n) {
    const int at = bytes;
    bytes += static_cast<int>(ceil_div(n, 16) * 16);
    return at;
  }
};

inline RouteLayout route_layout(const RouteParams& p, size_t acc_bytes) {
  RouteLayout layout{};
  const bool grouped = p.num_groups > 1;
  layout.values = layout.take(p.experts * acc_bytes);
  layout.keys = layout.take(grouped ? p.experts * acc_bytes : 0);
  layout.groups = layout.take(grouped ? p.num_groups * acc_bytes : 0);
  layout.chosen = layout.take(p.top_k * sizeof(int16_t));
  layout.kept = layout.take(grouped ? p.num_groups : 0);
  layout.group_size = p.experts / p.num_groups;
  return layout;
}

// Which groups keep their keys: kept[G] from the ordered keys [E]; groups[G] is scratch. Few groups share out the warp.
template <typename A>
__device__ void rank_groups(const RouteParams& p, int size, const Key<A>* keys, Key<A>* groups, bool* kept) {
  int share = 1;  // lanes a group
  while (2 * share * p.num_groups <= kWarp) share *= 2;
  for (int g0 = 0; g0 < p.num_groups; g0 += kWarp / share) {
    const int g = g0 + lane_id() / share, part = lane_id() % share;
    Key<A> first = 0, second = 0;
    for (int i = part; g < p.num_groups && i < size; i += share) {
      const Key<A> key = max(keys[g * size + i], ordered_key(-A(INFINITY)));  // a NaN cannot win its group
      second = max(second, min(first, key));
      first = max(first, key);
    }
    for (int d = 1; d < share; d *= 2) {
      const Key<A> other_first = __shfl_xor_sync(kAllLanes, first, d), other = __shfl_xor_sync(kAllLanes, second, d);
      second = max(max(second, other), min(first, other_first));
      first = max(first, other_first);
    }
    const bool both = p.group_rank == GroupRank::top2_sum && size > 1;
    if (part == 0 && g < p.num_groups) groups[g] = both ? ordered_key(number_of(first) + number_of(second)) : first;
  }
  __syncwarp();
  for (int g = lane_id(); g < p.num_groups; g += kWarp) {
    int better = 0;
    for (int other = 0; other < p.num_groups; ++other)
      better += groups[other] > groups[g] || (groups[other] == groups[g] && other < g);
    kept[g] = better < p.topk_groups;
  }
  __syncwarp();
}

// The ordered selection keys of a lane's experts.
template <typename A, int N>
__device__ __forceinline__ void selection_keys(const RouteParams& p, const RouteLayout& layout, unsigned char* shared,
                                               int64_t t, bool wide, const A (&logit)[N], const A (&score)[N],
                                               Key<A> (&key)[N]) {
  const int first = lane_id() * N;
  A number[N];
  if (p.selection_scores) {
    load_mine<N>(static_cast<const A*>(p.selection_scores) + t * p.experts, first, p.experts, wide, number);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) number[i] = p.weighting.after_topk ? logit[i] : score[i];
  }
  if (p.expert_bias) {
    A bias[N];
    load_mine<N>(static_cast<const A*>(p.expert_bias), first, p.experts, wide, bias);
#pragma unroll
    for (int i = 0; i < N; ++i) number[i] += bias[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) key[i] = first + i < p.experts ? ordered_key(number[i]) : Key<A>(0);
  if (p.num_groups == 1) return;

  Key<A>* keys = reinterpret_cast<Key<A>*>(shared + layout.keys);
  bool* kept = reinterpret_cast<bool*>(shared + layout.kept);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (first + i < p.experts) keys[first + i] = key[i];
  __syncwarp();
  const int size = layout.group_size;
  rank_groups<A>(p, size, keys, reinterpret_cast<Key<A>*>(shared + layout.groups), kept);
  int group = first / size, left = size - first % size;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i < p.experts && !kept[group] && key[i] != kNanKey) key[i] = ordered_key(-A(INFINITY));
    if (--left == 0) left = size, ++group;
  }
}

// shared: this warp's layout.bytes. wide: as load_mine takes it.
template <typename T, int N>
__device__ __forceinline__ void route_token(const RouteParams& p, const RouteLayout& layout, unsigned char* shared,
                                            int64_t t, bool wide) {
  using A = Acc<T>;
  const int first = lane_id() * N;
  A* values = reinterpret_cast<A*>(shared + layout.values);
  int16_t* chosen = reinterpret_cast<int16_t*>(shared + layout.chosen);
  const T* row = static_cast<const T*>(p.logits) + t * p.experts;

  A logit[N], score[N];
  load_mine<N>(row, first, p.experts, wide, logit);
  const bool nan_row = score_row(p.weighting.score, logit, score);
  Key<A> key[N];
  if (!p.replay_ids) selection_keys(p, layout, shared, t, wide, logit, score, key);
  if (nan_row) fill(score, A(NAN));
  store_mine<N>(static_cast<A*>(p.scores) + t * p.experts, first, p.experts, wide, score);
  store_mine<N>(values, first, p.experts, wide, score);
  if (!p.replay_ids) select_top<A, N>(key, p.top_k, chosen);
  __syncwarp();

  const auto id_of = [&](int k) -> int {
    return p.replay_ids ? static_cast<int>(p.replay_ids[t * p.top_k + k]) : chosen[k];
  };
  if (p.replay_ids)
    for (int k = lane_id(); k < p.top_k; k += kWarp)
      require_expert_id(t * p.top_k + k, p.replay_ids[t * p.top_k + k], p.experts);
  const Selected selected(p.weighting, p.top_k, id_of, values, row);
  for (int k = lane_id(); k < p.top_k; k += kWarp) {
    const int id = id_of(k);
    static_cast<A*>(p.topk_weights)[t * p.top_k + k] = id < 0 ? A(0) : selected.weight(selected.value(id));
    p.topk_ids[t * p.top_k + k] = id;
  }
}

// f(N) for N experts a lane. The rarer types have fewer variants, to keep the build short.
template <typename T, int N = 1, typename F>
cudaError_t with_experts(int experts, F&& f) {
  constexpr bool built = std::is_same_v<T, float> || N == 2 || N == 8 || N == 32;
  if constexpr (N < 32)
    if (!built || experts > N * kWarp) return with_experts<T, 2 * N>(experts, f);
  if constexpr (built) return f(std::integral_constant<int, N>{});
}

template <typename T, int N>
bool rows_are_wide(int experts, std::initializer_list<const void*> narrow, std::initializer_list<const void*> acc) {
  const auto all = [](auto list, size_t bytes) {
    return std::all_of(list.begin(), list.end(), [&](const void* p) { return aligned_to(p, bytes); });
  };
  return experts % kRowVector<T, N> == 0 && all(narrow, sizeof(T) * kRowVector<T, N>) && all(acc, 16);
}

}  // namespace fastmoe_cpp::cuda
