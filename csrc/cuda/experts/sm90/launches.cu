// The six launches: checks that need no device, the choice of dtype, and tensor maps.
#include <cuda_runtime_api.h>

#include <cstring>

#include "launch.cuh"
#include "reduce.cuh"
#include "supports.h"

namespace fastmoe_cpp::cuda::sm90 {

cudaError_t encode(CUtensorMap* map, const MatrixView& view, int box_rows) {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      entry = nullptr;
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  if (function == nullptr) return cudaErrorNotSupported;
  if (!is_aligned(view.data)) return cudaErrorMisalignedAddress;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(view.columns), static_cast<cuuint64_t>(view.rows),
                               static_cast<cuuint64_t>(view.halves), static_cast<cuuint64_t>(view.experts)};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(view.row_stride * 2),
                                 static_cast<cuuint64_t>(view.half_stride * 2),
                                 static_cast<cuuint64_t>(view.expert_stride * 2)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto run = [&] {
    return function(map, view.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                    4, const_cast<void*>(view.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                    CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = run();
  if (result != CUDA_SUCCESS) {
    // This thread may not have called the runtime yet, which gives it its context: a backward thread whose memory was
    // all in the allocator's cache.
    int device;
    FASTMOE_RETURN_IF_ERROR(cudaGetDevice(&device));
    FASTMOE_RETURN_IF_ERROR(cudaSetDevice(device));
    result = run();
  }
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

bool supports(const ExpertShape& shape) {
  return (shape.dtype == DType::bf16 || shape.dtype == DType::f16) && shape.hidden > 0 && shape.intermediate > 0 &&
         shape.hidden % 8 == 0 && shape.intermediate % 8 == 0 && shape.experts <= 1024 && shape.hidden < (1 << 30) &&
         shape.intermediate < (1 << 29) && shape.tokens * (shape.hidden / 8) < int64_t{1} << 32;
}

namespace {

// Calls body with a value of the element type.
template <class Body>
cudaError_t with_dtype(const ExpertShape& shape, Body&& body) {
  if (!supports(shape)) return cudaErrorInvalidValue;
  return shape.dtype == DType::f16 ? body(__half{}) : body(__nv_bfloat16{});
}

// Without slots every gradient is zero, and no kernel need write it.
cudaError_t zero_weight_grad(const WeightGradParams& p, int64_t rows, int64_t columns, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(p.shape.experts) * rows * 2;
  if (p.grad != nullptr && !p.adds) FASTMOE_RETURN_IF_ERROR(cudaMemsetAsync(p.grad, 0, bytes * columns, stream));
  return p.grad_bias == nullptr ? cudaSuccess : cudaMemsetAsync(p.grad_bias, 0, bytes, stream);
}

}  // namespace

cudaError_t up(const UpParams& p, cudaStream_t stream) {
  if (p.shape.slots() == 0) return cudaSuccess;
  return with_dtype(p.shape, [&](auto zero) { return launch_up<decltype(zero)>(p, stream); });
}

cudaError_t down(const DownParams& p, cudaStream_t stream) {
  if (p.shape.slots() == 0) return cudaSuccess;
  return with_dtype(p.shape, [&](auto zero) { return launch_down<decltype(zero)>(p, stream); });
}

cudaError_t input_grad(const InputGradParams& p, cudaStream_t stream) {
  if (p.shape.slots() == 0) return cudaSuccess;
  return with_dtype(p.shape, [&](auto zero) { return launch_input_grad<decltype(zero)>(p, stream); });
}

static int act_grad_tiles(const ExpertShape& shape) {
  return static_cast<int>(ceil_div(shape.intermediate, configure(Product::act_grad, shape).tile_columns));
}

size_t act_grad_scratch_bytes(const ActGradParams& p) {
  return p.grad_weight == nullptr ? 0 : static_cast<size_t>(act_grad_tiles(p.shape)) * p.shape.slots() * sizeof(float);
}

cudaError_t act_grad(const ActGradParams& p, void* scratch, cudaStream_t stream) {
  if (p.shape.slots() == 0) return cudaSuccess;
  float* const partial = p.grad_weight == nullptr ? nullptr : static_cast<float*>(scratch);
  return with_dtype(p.shape, [&](auto zero) {
    using T = decltype(zero);
    FASTMOE_RETURN_IF_ERROR(launch_act_grad<T>(p, partial, stream));
    return partial == nullptr ? cudaSuccess : launch_weight_dot<T>(p, partial, act_grad_tiles(p.shape), stream);
  });
}

cudaError_t act_grad(const ActGradParams& p, cudaStream_t stream) {
  const size_t bytes = act_grad_scratch_bytes(p);
  if (bytes == 0) return act_grad(p, nullptr, stream);
  void* scratch = nullptr;
  FASTMOE_RETURN_IF_ERROR(cudaMallocAsync(&scratch, bytes, stream));
  const cudaError_t error = act_grad(p, scratch, stream);
  const cudaError_t freed = cudaFreeAsync(scratch, stream);
  return error != cudaSuccess ? error : freed;
}

cudaError_t gate_up_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  const int64_t rows = p.shape.up_rows();
  if (p.sum_blocks > 0 && (p.grad == nullptr || p.shape.slots() == 0)) return cudaErrorInvalidValue;
  if (p.shape.slots() == 0) return zero_weight_grad(p, rows, p.shape.hidden, stream);
  return with_dtype(p.shape, [&](auto zero) {
    using T = decltype(zero);
    if (p.grad != nullptr) FASTMOE_RETURN_IF_ERROR(launch_gate_up_weight_grad<T>(p, stream));
    if (p.grad_bias == nullptr) return cudaSuccess;
    return launch_bias_grad<T>(p.shape, p.plan, p.left, rows, false, nullptr,
                               p.shape.interleaved && is_gated(p.shape.activation), p.grad_bias, stream);
  });
}

cudaError_t down_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
  if (p.shape.slots() == 0) return zero_weight_grad(p, p.shape.hidden, p.shape.intermediate, stream);
  return with_dtype(p.shape, [&](auto zero) {
    using T = decltype(zero);
    if (p.grad != nullptr) FASTMOE_RETURN_IF_ERROR(launch_down_weight_grad<T>(p, stream));
    if (p.grad_bias == nullptr) return cudaSuccess;
    return launch_bias_grad<T>(p.shape, p.plan, p.left, p.shape.hidden, true,
                               p.shape.weight_on_input ? nullptr : p.plan.weights, false, p.grad_bias, stream);
  });
}

}  // namespace fastmoe_cpp::cuda::sm90
