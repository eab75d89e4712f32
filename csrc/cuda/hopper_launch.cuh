// What launches may use from compute capability 9.0 on.
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <atomic>

namespace fastmoe_cpp::cuda {

// Programmatic dependent launch; without effect before compute capability 9.0, where no launch asks for it.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void launch_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the code of a kernel that the current device runs is for compute capability 9.0 or newer, where clusters and
// programmatic dependent launch are: code for 8.0 that a newer device runs has neither.
template <auto kKernel>
cudaError_t is_hopper_code(bool* yes) {
  static std::array<std::atomic<int>, 64> known;  // 1: no, 2: yes
  int device = 0;
  if (const auto e = cudaGetDevice(&device)) return e;
  int answer = device < static_cast<int>(known.size()) ? known[device].load() : 0;
  if (answer == 0) {
    cudaFuncAttributes attributes;
    if (const auto e = cudaFuncGetAttributes(&attributes, kKernel)) return e;
    answer = attributes.ptxVersion >= 90 ? 2 : 1;
    if (device < static_cast<int>(known.size())) known[device] = answer;
  }
  *yes = answer == 2;
  return cudaSuccess;
}

// The attribute of a launch whose kernel waits by itself for the one before.
inline cudaLaunchAttribute programmatic_launch() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// launch() of device.cuh for a kernel that begins with wait_for_previous_kernel(): its blocks may take their places while
// the kernel before it ends.
template <auto kKernel, typename... Args>
cudaError_t launch_waiting(int64_t blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream, Args... args) {
  bool programmatic;
  if (const auto e = is_hopper_code<kKernel>(&programmatic)) return e;
  cudaLaunchAttribute attribute = programmatic_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, args...);
}

}  // namespace fastmoe_cpp::cuda
