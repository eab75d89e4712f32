// The kernel: a warp's items one after another, the slots' rows from L1, sums in registers and over the warp at the end.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>

#include "../../hopper_launch.cuh"
#include "combine.cuh"
#include "epilogue.cuh"
#include "stream.cuh"

namespace fastmoe_cpp::cuda::gemv {

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// sums[c][r] += this lane's part of <weight row c, slot row r>, in the same order for every kSlots.
template <int kSlots, class Traits>
__device__ __forceinline__ void multiply(float (&sums)[Traits::kRows][kMaxRows], const WeightStream<Traits>& stream,
                                         const uint4 (&rows)[kMaxRows]) {
  using T = typename Traits::T;
  uint4 weight[Traits::kRows];
#pragma unroll
  for (int c = 0; c < Traits::kRows; ++c) weight[c] = stream.read(c);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 x[kSlots];
#pragma unroll
    for (int r = 0; r < kSlots; ++r) x[r] = unpack<T>(word(rows[r], i));
#pragma unroll
    for (int c = 0; c < Traits::kRows; ++c) {
      const float2 w = unpack<T>(word(weight[c], i));
#pragma unroll
      for (int r = 0; r < kSlots; ++r) sums[c][r] = fmaf(w.y, x[r].y, fmaf(w.x, x[r].x, sums[c][r]));
    }
  }
}

// Adds kCount values a lane over the warp; of every 32 / kCount neighbouring lanes each gets the sum of one of them, in
// the order of the lanes. Each is added up in the same order whatever kCount is.
template <int kCount, int kDistance = kWarp / 2>
__device__ __forceinline__ float add_lanes(const float (&values)[kCount]) {
  if constexpr (kDistance == 0) {
    return values[0];
  } else if constexpr (kCount == 1) {
    const float sum[1] = {values[0] + __shfl_xor_sync(kAllLanes, values[0], kDistance)};
    return add_lanes<1, kDistance / 2>(sum);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane_id() & kDistance;
    float half[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? values[i + kHalf] : values[i], sent = upper ? values[i] : values[i + kHalf];
      half[i] = kept + __shfl_xor_sync(kAllLanes, sent, kDistance);
    }
    return add_lanes<kHalf, kDistance / 2>(half);
  }
}

// Lane r of the warp, r < kSlots, gets the sums of slot r.
template <int kSlots, int kRows>
__device__ __forceinline__ void sums_of_slot(const float (&sums)[kRows][kMaxRows], float (&mine)[kRows]) {
  constexpr int kCount = kSlots * kRows;
  float values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = sums[i % kRows][i / kRows];
  const float sum = add_lanes(values);
#pragma unroll
  for (int c = 0; c < kRows; ++c) {
    mine[c] = __shfl_sync(kAllLanes, sum, (lane_id() % kSlots * kRows + c) * (kWarp / kCount));
  }
}

// body(number of slots to compute, as a constant), for 1 <= slots <= kMaxRows.
template <class Body>
__device__ __forceinline__ void with_slots(int slots, Body&& body) {
  static_assert(kMaxRows == 4);
  if (slots == 1) return body(std::integral_constant<int, 1>{});
  if (slots == 2) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 4>{});
}

// At most 80 registers, so that kResident blocks fit; down's take their places as up's leave.
template <class Traits>
__global__ void __launch_bounds__(kThreads, kResident) multiply_rows(const __grid_constant__ Arguments args) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int counts[kWarps];

  // Every thread waits, with work or without: the kernel after this one counts on it that the one before has ended.
  if (Traits::kUp || !args.reads_ahead) wait_for_previous_kernel();
  if constexpr (Traits::kUp) launch_next_kernel();  // after the wait, so what is before up is there for down to read
  auto* const list = reinterpret_cast<ListedExpert*>(shared + kRingChunks * 16 * kThreads);
  [[maybe_unused]] __shared__ typename TokenSum<Traits>::Memory memory;
  TokenSum<Traits> token(args, memory);
  if constexpr (Traits::kCombined) token.fetch();
  const Items<Traits> items(args, list, list_experts(args.expert_offsets, args.experts, list, counts));
  WeightStream<Traits> stream(args, items, portable::shared_address(shared));
#pragma unroll 1
  for (int i = 0; i < Traits::kSteps - 1; ++i) stream.copy();
  if (!Traits::kUp && args.reads_ahead) wait_for_previous_kernel();
  if constexpr (!Traits::kUp) launch_next_kernel();

  const T* const x = static_cast<const T*>(args.rows);
  for (int item = Items<Traits>::first(); Items<Traits>::lowest(item) < items.total; item += Items<Traits>::step()) {
    int group;
    const ListedExpert e = items.find(item, group);
    const auto biases = Epilogue<Traits>::fetch(args, e.expert, group);
    for (int done = 0; done < e.slots; done += kMaxRows) {
      const int slot = e.first + done, slots = min(e.slots - done, kMaxRows);
      int row[kMaxRows];
#pragma unroll
      for (int r = 0; r < kMaxRows; ++r) {
        row[r] = Traits::kUp ? (r < slots ? args.slot_index[slot + r] / args.top_k : 0) : slot + r;
      }
      float sums[kRows][kMaxRows] = {};
#pragma unroll 1
      for (int k = 0; k < args.k; k += kStepElements) {
        const int mine = k + lane_id() * kLaneElements;
        uint4 rows[kMaxRows];
#pragma unroll
        for (int r = 0; r < kMaxRows; ++r) {
          rows[r] = uint4{};
          if (r < slots && mine < args.k) {
            rows[r] = *reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row[r]) * args.k + mine);
          }
        }
        stream.wait();
        stream.copy();
        with_slots(slots, [&](auto n) { multiply<n()>(sums, stream, rows); });
      }
      float mine[kRows];
      with_slots(slots, [&](auto n) { sums_of_slot<n()>(sums, mine); });
      if (lane_id() < slots) {
        if constexpr (Traits::kCombined) {
          token.put(slot + lane_id(), Epilogue<Traits>::row(args, biases, mine));
        } else {
          Epilogue<Traits>::store(args, slot + lane_id(), group, biases, mine);
        }
      }
    }
    if constexpr (Traits::kCombined) token.add(Items<Traits>::lowest(item));
  }
}

#define FASTMOE_RETURN_IF_ERROR(expression) \
  if (const cudaError_t error_ = (expression); error_ != cudaSuccess) return error_

// What a launch needs to know of a device and of the machine code that the kernel has there.
struct Facts {
  int blocks;         // at most
  bool programmatic;  // the code waits for the kernel before it by itself
};

constexpr size_t shared_bytes(int64_t listed) { return kRingChunks * 16 * kThreads + listed * sizeof(ListedExpert); }

// Of a launch with so many listed experts kResident blocks share Hopper's 228 KB, of which the driver takes 1 KB a block; a
// longer list costs one of them.
inline constexpr int kShortList = 512;
static_assert(kResident * (shared_bytes(kShortList) + sizeof(TokenSum<Traits<__half, Kind::combined_down>>::Memory) +
                           sizeof(int) * kWarps + 1024) <=
              228 * 1024);

template <class Traits>
cudaError_t facts_of_device(bool short_list, Facts* facts) {
  static std::array<std::atomic<int>, 64> known_of[2];  // 2 * blocks + programmatic
  auto& known = known_of[short_list];
  const auto kernel = multiply_rows<Traits>;
  int device;
  FASTMOE_RETURN_IF_ERROR(cudaGetDevice(&device));
  int both = device < static_cast<int>(known.size()) ? known[device].load() : 0;
  if (both == 0) {
    int multiprocessors, fitting;
    bool programmatic;
    FASTMOE_RETURN_IF_ERROR(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(kMaxListed)));
    // up and down run beside each other only with the same division of L1.
    FASTMOE_RETURN_IF_ERROR(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    FASTMOE_RETURN_IF_ERROR(is_hopper_code<multiply_rows<Traits>>(&programmatic));
    FASTMOE_RETURN_IF_ERROR(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    FASTMOE_RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &fitting, kernel, kThreads, shared_bytes(short_list ? kShortList : kMaxListed)));
    both = 2 * multiprocessors * std::clamp(fitting, 1, kResident) + (programmatic ? 1 : 0);
    if (device < static_cast<int>(known.size())) known[device] = both;
  }
  *facts = {both / 2, both % 2 == 1};
  return cudaSuccess;
}

template <class T, Kind kKind>
cudaError_t launch(const ExpertShape& shape, Arguments args, cudaStream_t stream) {
  using Traits = gemv::Traits<T, kKind>;
  const int64_t listed = std::min<int64_t>(shape.experts, shape.slots());  // at most
  Facts facts;
  FASTMOE_RETURN_IF_ERROR(facts_of_device<Traits>(listed <= kShortList, &facts));
  const int64_t places = Traits::kCombined ? shape.top_k : listed;
  const int64_t items = places * (Traits::kGated ? args.columns : args.columns / Traits::kRows);
  args.reads_ahead = args.reads_ahead && facts.programmatic;
  cudaLaunchAttribute attribute = programmatic_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(facts.blocks, ceil_div(items, kWarps))));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes(listed);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = facts.programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, multiply_rows<Traits>, args);
}

#undef FASTMOE_RETURN_IF_ERROR

}  // namespace fastmoe_cpp::cuda::gemv
