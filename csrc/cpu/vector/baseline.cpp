// 16-byte vectors, which every 64-bit CPU has, and the choice among the sets.
#include <ATen/Version.h>

#include "headers.h"

#define FASTMOE_INSTRUCTIONS baseline
#define FASTMOE_VECTOR_BYTES 16
#include "kernels_impl.h"

namespace fastmoe_cpp::cpu {

template <typename T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  static const Kernels<T>& chosen = capability == "AVX512" ? avx512::kernels<T>()
                                    : capability == "AVX2" ? avx2::kernels<T>()
                                                           : baseline::kernels<T>();
  return chosen;
#else
  return baseline::kernels<T>();
#endif
}
template const Kernels<double>& kernels<double>();
template const Kernels<float>& kernels<float>();
template const Kernels<c10::BFloat16>& kernels<c10::BFloat16>();
template const Kernels<c10::Half>& kernels<c10::Half>();

}  // namespace fastmoe_cpp::cpu
