// Configuration -> launch, for one kind of product and one element type a file.
#pragma once
#include "gemm.cuh"
#include "launch.h"

namespace fastmoe_cpp::cuda::portable {

template <class Traits>
cudaError_t launch_gemm(const Configuration& c, const Arguments& args, cudaStream_t stream) {
  if (const cudaError_t e = allow_shared_memory<grouped_gemm<Traits>>(static_cast<size_t>(c.shared_bytes))) return e;
  return fastmoe_cpp::cuda::launch(grouped_gemm<Traits>, c.grid, dim3(Traits::kThreads), c.shared_bytes, stream, args,
                                   c.stages);
}

template <Kind kKind, class T, bool kScaled>
cudaError_t launch_tiling(const Configuration& c, bool vectorised, const Arguments& args, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (!vectorised) return launch_gemm<Traits<kKind, T, false, 64, 128, 2, 2, 3, kScaled>>(c, args, stream);
    switch (c.tiling) {
      case Tiling::small:
        if constexpr (kKind == Kind::up || kKind == Kind::linear) {
          return launch_gemm<Traits<kKind, T, true, 16, 64, 1, 4, 4>>(c, args, stream);
        } else {
          return cudaErrorInvalidValue;
        }
      case Tiling::pair: return launch_gemm<Traits<kKind, T, true, 128, 128, 2, 2, 2, kScaled>>(c, args, stream);
      case Tiling::large: return launch_gemm<Traits<kKind, T, true, 128, 256, 2, 4, 1, kScaled>>(c, args, stream);
      default: return launch_gemm<Traits<kKind, T, true, 64, 128, 2, 2, 3, kScaled>>(c, args, stream);
    }
  } else {
    constexpr int kTileM = sizeof(T) == 4 ? 64 : 32;
    if (vectorised) return launch_gemm<Traits<kKind, T, true, kTileM, 128, 2, 2, 2, kScaled>>(c, args, stream);
    return launch_gemm<Traits<kKind, T, false, kTileM, 128, 2, 2, 2, kScaled>>(c, args, stream);
  }
}

template <Kind kKind, class T>
cudaError_t launch(const Configuration& c, bool vectorised, const Arguments& args, cudaStream_t stream) {
  if constexpr (kKind == Kind::weight_grad)
    if (args.weights) return launch_tiling<kKind, T, true>(c, vectorised, args, stream);
  return launch_tiling<kKind, T, false>(c, vectorised, args, stream);
}

}  // namespace fastmoe_cpp::cuda::portable
