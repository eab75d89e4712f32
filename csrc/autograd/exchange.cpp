#include "../ops/exchange.h"

#include <string>

#include "function.h"

namespace fastmoe_cpp::autograd {
namespace {

// What came from a rank goes back to it. Backward is the operator itself, so it has a gradient of its own.
struct Exchange : torch::autograd::Function<Exchange> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, c10::SymIntArrayRef send_counts,
                        c10::SymIntArrayRef recv_counts, std::string_view group_name, std::string_view operation,
                        std::string_view caller) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto& data = ctx->saved_data;
    data["send_counts"] = send_counts;
    data["recv_counts"] = recv_counts;
    data["group_name"] = std::string(group_name);
    data["operation"] = std::string(operation);
    data["caller"] = std::string(caller);
    return exchange(rows, send_counts, recv_counts, group_name, operation, caller);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const std::string backward = " backward";
    auto& data = ctx->saved_data;
    std::string operation = data["operation"].toStringRef();
    // the gradient of a gradient goes on as "backward"
    if (operation.size() < backward.size() ||
        operation.compare(operation.size() - backward.size(), backward.size(), backward))
      operation += backward;
    const Tensor grad = exchange(grads[0], data["recv_counts"].toSymIntVector(), data["send_counts"].toSymIntVector(),
                                 data["group_name"].toStringRef(), operation, data["caller"].toStringRef());
    return {grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor exchange_autograd(const Tensor& rows, c10::SymIntArrayRef send_counts, c10::SymIntArrayRef recv_counts,
                         std::string_view group_name, std::string_view operation, std::string_view caller) {
  if (recording({&rows})) return Exchange::apply(rows, send_counts, recv_counts, group_name, operation, caller);
  at::AutoDispatchBelowADInplaceOrView guard;
  return exchange(rows, send_counts, recv_counts, group_name, operation, caller);
}

}  // namespace
}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp, Autograd, m) { m.impl("exchange", fastmoe_cpp::autograd::exchange_autograd); }
