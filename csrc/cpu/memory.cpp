#include "memory.h"

#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmoe_cpp::cpu {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const auto data = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t begin = (data + kPage - 1) & ~(kPage - 1), end = (data + tensor.nbytes()) & ~(kPage - 1);
  // a hint: where the system refuses it, nothing is lost
  if (end > begin + kPage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace fastmoe_cpp::cpu
