#include "exchange.h"

#include <torch/library.h>

#include <exception>
#include <string>

#include "checking.h"
#include "typed_call.h"

namespace fastmoe_cpp {
using namespace checking;

void check_exchange(const Tensor& rows, c10::SymIntArrayRef send_counts, c10::SymIntArrayRef recv_counts) {
  const Arg r{rows, "rows"};
  dims(r, 2, "[N, H]");
  floating(r);
  TORCH_CHECK_VALUE(send_counts.size() == recv_counts.size() && !send_counts.empty(),
                    "send_counts and recv_counts must hold one count for each rank of the group, got ",
                    send_counts.size(), " and ", recv_counts.size());
  c10::SymInt sent = 0;
  for (const auto& count : send_counts) {
    at_least(count, 0, "every one of send_counts");
    sent += count;
  }
  for (const auto& count : recv_counts) at_least(count, 0, "every one of recv_counts");
  size_is(r, 0, sent, "[N, H] with N the sum of send_counts");
}

Tensor exchange(const Tensor& rows, c10::SymIntArrayRef send_counts, c10::SymIntArrayRef recv_counts,
                std::string_view group_name, std::string_view operation, std::string_view caller) {
  return FASTMOE_OP(exchange).call(rows, send_counts, recv_counts, group_name, operation, caller);
}

namespace {

std::string failure(std::string_view operation, int64_t rows, std::string_view caller, std::string cause) {
  return c10::str(operation, " of ", rows, " rows failed on ", caller, ": ", cause.substr(0, cause.find('\n')));
}

// The collective is torch's functional one, called through the dispatcher: any backend of the group, and what traces or
// replaces it sees it. Called boxed: the type of group_name in its schema differs between releases of torch (str, Any).
Tensor all_to_all(const Tensor& rows, c10::SymIntArrayRef recv_counts, c10::SymIntArrayRef send_counts,
                  std::string_view group_name) {
  auto& dispatcher = c10::Dispatcher::singleton();
  static const auto all_to_all_single = dispatcher.findSchemaOrThrow("_c10d_functional::all_to_all_single", "");
  static const auto wait_tensor = dispatcher.findSchemaOrThrow("_c10d_functional::wait_tensor", "");
  torch::jit::Stack stack{rows, recv_counts, send_counts, std::string(group_name)};
  all_to_all_single.callBoxed(stack);  // leaves the received rows, which are wait_tensor's argument
  wait_tensor.callBoxed(stack);
  return stack[0].toTensor();
}

Tensor exchange_rows(const Tensor& rows, c10::SymIntArrayRef send_counts, c10::SymIntArrayRef recv_counts,
                     std::string_view group_name, std::string_view operation, std::string_view caller) {
  check_exchange(rows, send_counts, recv_counts);
  try {
    return all_to_all(rows.contiguous(), recv_counts, send_counts, group_name);
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(DistBackendError, failure(operation, rows.size(0), caller, error.what_without_backtrace()));
  } catch (const std::exception& error) {
    C10_THROW_ERROR(DistBackendError, failure(operation, rows.size(0), caller, error.what()));
  }
}

}  // namespace
}  // namespace fastmoe_cpp

TORCH_LIBRARY_IMPL(fastmoe_cpp, CPU, m) { m.impl("exchange", fastmoe_cpp::exchange_rows); }
#ifdef FASTMOE_CUDA
TORCH_LIBRARY_IMPL(fastmoe_cpp, CUDA, m) { m.impl("exchange", fastmoe_cpp::exchange_rows); }
#endif
