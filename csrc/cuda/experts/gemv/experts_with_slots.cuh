// The list of experts that have slots: every block makes its own from expert_offsets.
#pragma once
#include "../../device.cuh"
#include "gemv.h"

namespace fastmoe_cpp::cuda::gemv {

inline constexpr int kWarps = kThreads / kWarp;

struct alignas(16) ListedExpert {
  int expert, first, slots;
};

// By all threads of the block. The experts come in order; returns their number. counts: [kWarps], shared.
// Reads past L1, so that the plan is as L2 has it even where this kernel began before its predecessor ended.
__device__ __forceinline__ int list_experts(const int32_t* expert_offsets, int experts, ListedExpert* list,
                                            int* counts) {
  constexpr int kEach = 4;
  const int warp = threadIdx.x / kWarp, lane = lane_id();
  int listed = 0;
  for (int base = 0; base < experts; base += kThreads * kEach) {
    int first[kEach], slots[kEach], here = 0;
    unsigned found[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int expert = base + (warp * kEach + i) * kWarp + lane;
      first[i] = slots[i] = 0;
      if (expert < experts) {
        first[i] = __ldcg(expert_offsets + expert);
        slots[i] = __ldcg(expert_offsets + expert + 1);
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      slots[i] -= first[i];
      found[i] = __ballot_sync(kAllLanes, slots[i] > 0);
      here += __popc(found[i]);
    }
    if (lane == 0) counts[warp] = here;
    __syncthreads();
    int at = listed;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int theirs = counts[w];
      at += w < warp ? theirs : 0;
      listed += theirs;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (slots[i] > 0) {
        list[at + __popc(found[i] & ((1u << lane) - 1))] = {base + (warp * kEach + i) * kWarp + lane, first[i],
                                                            slots[i]};
      }
      at += __popc(found[i]);
    }
    __syncthreads();
  }
  return listed;
}

}  // namespace fastmoe_cpp::cuda::gemv
