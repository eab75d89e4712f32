// The grouped GEMM of the Hopper path: one persistent, warp-specialised kernel around a ring of shared-memory stages.
// One warp loads by TMA; two gather rows by cp.async, and one publishes them; two warpgroups multiply (wgmma) and
// write.
//   cooperative: both multiply one tile, 64 of its rows each;  ping-pong: each has its own tile, and one's epilogue
//   runs under the other's main loop.
#pragma once
#include "produce.cuh"

namespace fastmoe_cpp::cuda::sm90 {

// Weight gradients: makes B's slots past the expert's end zero, as A's are, and scales A's slots where asked.
template <class G>
__device__ __forceinline__ void fix_slots(const Arguments<G>& args, const Tile& tile, int k_block, uint32_t a,
                                          uint32_t b, int group) {
  const int valid = tile.rows - k_block * kBlockK;
  const bool scaled = args.slot_scale != nullptr;
  if (valid >= kBlockK && !scaled) return;
  const int thread = threadIdx.x & 127;
  // B is shared, and both warpgroups write the same zeros.
#pragma unroll 1
  for (int row = max(valid, 0) + (thread >> 3); row < kBlockK; row += 16) {
#pragma unroll
    for (int box = 0; box < G::kN / 64; ++box)
      ptx::store_shared_16(b + box * kBoxBytes + row * 128 + (thread & 7) * 16, {0, 0, 0, 0});
  }
  // A's block of this warpgroup is its own.
  if (scaled) {
    using T = typename G::T;
#pragma unroll 1
    for (int row = thread >> 3; row < min(valid, kBlockK); row += 16) {
      const float scale = args.slot_scale[args.slot_index[tile.first + k_block * kBlockK + row]];
      const uint32_t address = a + group * kBoxBytes + row * 128 + (thread & 7) * 16;
      alignas(16) T values[8];
      uint32_t (&words)[4] = reinterpret_cast<uint32_t (&)[4]>(values);
      ptx::load_shared_16(words, address);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = T(static_cast<float>(values[j]) * scale);
      ptx::store_shared_16(address, words);
    }
  }
  ptx::proxy_fence();
  ptx::named_barrier_sync(kTransformBarrier + group, 128);
}

// Step `step` of what is left of an earlier tile.
template <class G, int kStep = 0>
__device__ __forceinline__ void store_step(int step, const Arguments<G>& args, const Tile& tile, int first_row,
                                           const Packed<G>& words) {
  if constexpr (kStep < G::Epilogue::template kSteps<G>) {
    if (step == kStep) {
      G::Epilogue::template step<G, kStep>(args, tile, first_row, words);
    } else {
      store_step<G, kStep + 1>(step, args, tile, first_row, words);
    }
  }
}

template <class G, int kStep = 0>
__device__ __forceinline__ void store_all(const Arguments<G>& args, const Tile& tile, int first_row,
                                          const Packed<G>& words) {
  if constexpr (kStep < G::Epilogue::template kSteps<G>) {
    G::Epilogue::template step<G, kStep>(args, tile, first_row, words);
    store_all<G, kStep + 1>(args, tile, first_row, words);
  }
}

// `hands_over`: the other warpgroup's main loop may start under this one's end. between(k_block) runs while the tensor
// cores work on that block.
template <class G, class Between>
__device__ __forceinline__ void multiply(float (&accumulators)[G::kN / 2], const Arguments<G>& args, const Tile& tile,
                                         int k_blocks, const Ring& ring, Position<G::kStages>& position, int group,
                                         bool hands_over, Between&& between) {
  constexpr int kTransposeA = is_mn_major(G::kA), kTransposeB = is_mn_major(G::kB);
  constexpr int kStepA = (kTransposeA ? 2048 : 32) >> 4, kStepB = (kTransposeB ? 2048 : 32) >> 4;
  const uint32_t a_offset = G::kCooperative ? group * kBoxBytes : 0;
  const uint64_t a_base = ptx::matrix_descriptor(ring.stages + a_offset, kTransposeA ? kBoxBytes : 16);
  const uint64_t b_base = ptx::matrix_descriptor(ring.stages + G::kABytes, kTransposeB ? kBoxBytes : 16);
  int previous = 0;
  for (int k_block = 0; k_block < k_blocks; ++k_block) {
    const int stage = position.stage;
    ptx::barrier_wait(ring.full + stage * 8, position.phase);
    if constexpr (G::kGathers && !G::kPublishes) ptx::proxy_fence();
    if constexpr (G::kWeightGrad) {
      const uint32_t a = ring.stages + stage * G::kStageBytes;
      fix_slots<G>(args, tile, k_block, a, a + G::kABytes, group);
    }
    const uint64_t a = a_base + stage * (G::kStageBytes >> 4), b = b_base + stage * (G::kStageBytes >> 4);
    ptx::fence_registers(accumulators);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
      ptx::wgmma<typename G::T, G::kN, kTransposeA, kTransposeB>(accumulators, a + k * kStepA, b + k * kStepB,
                                                                 (k_block | k) != 0);
    }
    ptx::wgmma_commit();
    ptx::fence_registers(accumulators);
    ptx::wgmma_wait<1>();
    if (k_block > 0) release<G>(ring, previous);
    between(k_block);
    previous = stage;
    position.advance();
  }
  if (hands_over) ptx::named_barrier_arrive(kOrderBarrier + (group ^ 1), 256);
  ptx::wgmma_wait<0>();
  ptx::fence_registers(accumulators);
  if (k_blocks > 0) release<G>(ring, previous);
}

template <class G>
__device__ __forceinline__ void consume(const Arguments<G>& args, const Schedule& schedule, const Ring& ring,
                                        int group) {
  static_assert(G::kCooperative || (!G::kWeightGrad && G::Epilogue::kInputHalves == 0));
  Position<G::kStages> position;
  float accumulators[G::kN / 2];
  const int first_row = G::kCooperative ? group * 64 : 0;  // of this warpgroup in its tiles
  constexpr bool kPacks = G::Epilogue::kHolds, kHolds = G::kHolds;
  // What is kept of a tile that is not stored yet.
  std::conditional_t<kPacks, Packed<G>, int> words;
  Tile held;
  bool holds = false;
  for (Walk<G> walk; walk.index < schedule.total(args.experts); walk.next(args, schedule, ring)) {
    if (!G::kCooperative && (walk.turn & 1) != group) {
      position.skip(k_blocks_of(args, Tile{}));
      continue;
    }
    const Tile tile = find_tile(args, schedule, walk.index);
    const int k_blocks = k_blocks_of(args, tile);
    // A warpgroup may wait for a stage only when every earlier phase of it has passed: parity tells just two apart.
    if (!G::kCooperative && walk.turn > 0) ptx::named_barrier_sync(kOrderBarrier + group, 256);
    if (G::kWeightGrad && k_blocks == 0) {
#pragma unroll
      for (int i = 0; i < G::kN / 2; ++i) accumulators[i] = 0;
    }
    const int rows_here = G::kWeightGrad ? G::kM : __shfl_sync(0xFFFFFFFF, tile.rows - first_row, 0);
    if (rows_here <= 0) {
      const int blocks = k_blocks + input_blocks_of(args, tile);
      for (int block = 0; block < blocks; ++block) {
        ptx::barrier_wait(ring.full + position.stage * 8, position.phase);
        __syncwarp();
        release<G>(ring, position.stage);
        position.advance();
      }
      continue;
    }
    const bool hands_over = !G::kCooperative && walk.index + Walk<G>::step(args) < schedule.total(args.experts);
    if constexpr (kPacks) {
      if (kHolds && holds && k_blocks < G::Epilogue::template kSteps<G>) {
        store_all<G>(args, held, first_row, words);
        holds = false;
      }
      multiply<G>(accumulators, args, tile, k_blocks, ring, position, group, hands_over, [&](int k_block) {
        if (kHolds && holds) store_step<G>(k_block, args, held, first_row, words);
      });
      G::Epilogue::template pack<G>(args, tile, first_row, accumulators, words);
      held = tile;
      holds = true;
      if (!kHolds) store_all<G>(args, held, first_row, words);
    } else {
      const auto ahead = G::Epilogue::template fetch<G>(args, tile, first_row);
      multiply<G>(accumulators, args, tile, k_blocks, ring, position, group, hands_over, [](int) {});
      G::Epilogue::template store<G>(args, tile, first_row, accumulators, ahead, ring, position);
    }
  }
  if constexpr (kHolds) {
    if (holds) store_all<G>(args, held, first_row, words);
  }
}

template <class G>
__global__ void __launch_bounds__(kThreads, 1) grouped_gemm(const __grid_constant__ Arguments<G> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared_memory[];
  uint8_t* const stages =
      reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared_memory) + 1023) & ~uintptr_t{1023});
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(stages + G::kStages * G::kStageBytes + 2 * G::kStagingBytes);
  Ring ring;
  ring.stages = ptx::shared_address(stages);
  ring.staging = ring.stages + G::kStages * G::kStageBytes;
  ring.full = ptx::shared_address(barriers);
  ring.empty = ring.full + G::kStages * 8;
  ring.landed = ring.empty + G::kStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < G::kStages; ++i) {
      ptx::barrier_init(ring.full + i * 8, G::kPublishes ? 2 : G::kGathers ? 1 + G::kGatherThreads : 1);
      ptx::barrier_init(ring.landed + i * 8, G::kGatherThreads);
      ptx::barrier_init(ring.empty + i * 8, (G::kCooperative ? 8 : 4) * G::kCluster);
    }
    if constexpr (G::kClaims) {
      for (int i = 0; i < 2; ++i) {
        ptx::barrier_init(Claim<G>(ring, i).full, 1);
        ptx::barrier_init(Claim<G>(ring, i).empty, kThreads / 32 * G::kCluster);
      }
    }
    ptx::barrier_init_fence();
    if (!is_gathered(G::kA)) ptx::tma_prefetch_descriptor(&args.a_map);
    ptx::tma_prefetch_descriptor(&args.b_map);
  }
  ptx::wait_for_previous_kernel();
  if constexpr (G::kCarriesSum) {
    if (blockIdx.x >= gridDim.x - args.sum.blocks) {  // whole clusters, to which nobody sends
      ptx::launch_next_kernel();
      static_assert(RowSum::kSharedBytes <= G::kStages * G::kStageBytes);
      return sum_slots<typename G::T>(args.sum, gridDim.x - 1 - blockIdx.x, ring.stages);
    }
  }
  const Schedule schedule = Schedule::build<G, kThreads>(reinterpret_cast<int*>(barriers + G::kBarriers),
                                                         args.expert_offsets, args.experts, args.m_tiles, args.n_tiles);
  ptx::launch_next_kernel();
  if constexpr (G::kCluster > 1) ptx::cluster_sync();  // every block's barriers are there
  const int group = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x >> 7), 0);
  if (group < 2) {
    ptx::increase_registers<G::kConsumerRegisters>();
    consume<G>(args, schedule, ring, group);
  } else {
    ptx::decrease_registers<G::kProducerRegisters>();
    const int warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x >> 5), 0) & 3;
    if constexpr (G::kGathers && !G::kPublishes) {
      gather_tiles<G>(args, schedule, ring);
    } else {
      if (warp == 2) load_tiles<G>(args, schedule, ring);
    }
    if constexpr (G::kPublishes) {
      if (warp < 2) gather_tiles<G>(args, schedule, ring);
      if (warp == 3) publish_tiles<G>(args, schedule, ring);
    }
  }
  if constexpr (G::kCluster > 1) ptx::cluster_sync();  // nobody sends to a block that has ended
#endif
}

}  // namespace fastmoe_cpp::cuda::sm90
