// Host side of the Hopper kernels: tensor maps, and the launch of one instantiation.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>

#include "../../device.cuh"
#include "../experts.h"
#include "config.h"
#include "epilogue.cuh"
#include "gemm.cuh"

namespace fastmoe_cpp::cuda::sm90 {

// A matrix [experts][halves][rows][columns] of 2-byte elements, strides in elements, read in boxes of 64 columns.
struct MatrixView {
  const void* data;
  DType dtype;
  int64_t columns, rows;
  int halves, experts;
  int64_t row_stride, half_stride, expert_stride;
};
cudaError_t encode(CUtensorMap* map, const MatrixView& view, int box_rows);

// gate_up_proj with its gate and up rows as two halves, whichever way they are laid out.
inline MatrixView gate_up_view(const ExpertShape& shape, const void* weight) {
  const int64_t h = shape.hidden, i = shape.intermediate;
  if (!is_gated(shape.activation)) return {weight, shape.dtype, h, i, 1, shape.experts, h, h, i * h};
  return {weight,   shape.dtype, h, i, 2, shape.experts, shape.interleaved ? 2 * h : h, shape.interleaved ? h : i * h,
          2 * i * h};
}
inline MatrixView down_view(const ExpertShape& shape, const void* weight) {
  const int64_t h = shape.hidden, i = shape.intermediate;
  return {weight, shape.dtype, i, h, 1, shape.experts, i, i, h * i};
}
// [P, halves * columns]
inline MatrixView slots_view(const ExpertShape& shape, const void* rows, int64_t columns, int halves) {
  return {rows, shape.dtype, columns, shape.slots(), halves, 1, halves * columns, columns, columns};
}

// Fills what every product needs; the caller adds operands, sizes and the epilogue.
template <class G>
Arguments<G> arguments(const ExpertShape& shape, const Plan& plan) {
  Arguments<G> args{};
  args.slot_index = plan.slot_index;
  args.expert_offsets = plan.expert_offsets;
  args.experts = shape.experts;
  // With l = ceil(log2 K), ceil(2^(31 + l) / K) divides every pair < 2^31 exactly by a multiplication.
  if (shape.top_k > 1) {
    int log = 1;
    while ((1ll << log) < shape.top_k) ++log;
    args.token_multiplier = static_cast<uint32_t>(((1ull << (31 + log)) + shape.top_k - 1) / shape.top_k);
    args.token_shift = log - 1;
  }
  args.k_halves = 1;
  return args;
}

#define FASTMOE_RETURN_IF_ERROR(expression) \
  if (const cudaError_t error_ = (expression); error_ != cudaSuccess) return error_

// How many clusters of this kernel a device holds at once; the first call also raises the kernel's shared memory there.
template <class G>
cudaError_t resident_clusters(int* clusters) {
  static std::array<std::atomic<int>, 64> known;
  int device;
  FASTMOE_RETURN_IF_ERROR(cudaGetDevice(&device));
  if (device < static_cast<int>(known.size()) && (*clusters = known[device]) > 0) return cudaSuccess;
  FASTMOE_RETURN_IF_ERROR(
      cudaFuncSetAttribute(grouped_gemm<G>, cudaFuncAttributeMaxDynamicSharedMemorySize, G::shared_bytes(1024)));
  int multiprocessors;
  FASTMOE_RETURN_IF_ERROR(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  *clusters = multiprocessors;
  if constexpr (G::kCluster > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {G::kCluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(multiprocessors / G::kCluster * G::kCluster);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = G::shared_bytes(1024);
    config.attrs = &attribute;
    config.numAttrs = 1;
    FASTMOE_RETURN_IF_ERROR(cudaOccupancyMaxActiveClusters(clusters, grouped_gemm<G>, &config));
    if (*clusters < 1) return cudaErrorLaunchOutOfResources;
  }
  if (device < static_cast<int>(known.size())) known[device] = *clusters;
  return cudaSuccess;
}

template <class G>
cudaError_t launch(const Arguments<G>& args, int64_t slots, cudaStream_t stream) {
  static_assert(G::shared_bytes(1024) <= 227 * 1024);
  int clusters;
  FASTMOE_RETURN_IF_ERROR(resident_clusters<G>(&clusters));
  const int64_t row_tiles = G::kWeightGrad ? static_cast<int64_t>(args.experts) * args.m_tiles
                                           : ceil_div(slots, G::kM) + std::min<int64_t>(args.experts, slots);
  if (row_tiles * args.n_tiles >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {G::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  const int summing = args.sum.blocks / G::kCluster;
  const int64_t walking = std::min<int64_t>(std::max(clusters - summing, 1), row_tiles * args.n_tiles);
  config.gridDim = dim3(static_cast<unsigned>(walking + summing) * G::kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = G::shared_bytes(args.experts);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = G::kCluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, grouped_gemm<G>, args);
}

// One instantiation file for each (dtype, product) defines these.
template <typename T>
cudaError_t launch_up(const UpParams&, cudaStream_t);
template <typename T>
cudaError_t launch_down(const DownParams&, cudaStream_t);
template <typename T>
cudaError_t launch_act_grad(const ActGradParams&, float* partial, cudaStream_t);
template <typename T>
cudaError_t launch_input_grad(const InputGradParams&, cudaStream_t);
template <typename T>
cudaError_t launch_gate_up_weight_grad(const WeightGradParams&, cudaStream_t);
template <typename T>
cudaError_t launch_down_weight_grad(const WeightGradParams&, cudaStream_t);

}  // namespace fastmoe_cpp::cuda::sm90
