#include "../ops/symmetric.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "function.h"

namespace fastmoe_cpp::autograd {
namespace {

using Pulled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Pushed = std::tuple<Tensor, Tensor>;

Pulled pull(const Tensor& x, const OptionalTensor& weights, const OptionalTensor& ids, const Tensor& slot_index,
            const Tensor& offsets, const Tensor& pairs, const Tensor& peers, at::IntArrayRef space,
            std::string_view name, int64_t max_rows) {
  using Op = Pulled(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                    const Tensor&, const Tensor&, at::IntArrayRef, std::string_view, int64_t);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastmoe_cpp_symmetric::pull", "").typed<Op>();
  return op.call(x, weights, ids, slot_index, offsets, pairs, peers, space, name, max_rows);
}

Pushed push(const Tensor& rows, const OptionalTensor& weights, const Tensor& layout, const Tensor& token_slot,
            const Tensor& peers, at::IntArrayRef space, std::string_view name) {
  using Op = Pushed(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, at::IntArrayRef,
                    std::string_view);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastmoe_cpp_symmetric::push", "").typed<Op>();
  return op.call(rows, weights, layout, token_slot, peers, space, name);
}

struct Dispatch : torch::autograd::Function<Dispatch> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weights, const Tensor& ids,
                               const Tensor& slot_index, const Tensor& token_slot, const Tensor& offsets,
                               const Tensor& pairs, const Tensor& peers, at::IntArrayRef space, std::string_view name,
                               int64_t max_rows) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [rows, row_weights, row_ids, layout, on_host] =
        pull(x, weights, ids, slot_index, offsets, pairs, peers, space, name, max_rows);
    ctx->save_for_backward({layout, token_slot, peers});
    ctx->saved_data["space"] = space.vec();
    ctx->saved_data["name"] = std::string(name);
    return {rows, row_weights, row_ids, layout, on_host};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto space = ctx->saved_data["space"].toIntVector();
    const auto [x, weights] = push(grads[0], grads[1], saved[0], saved[1], saved[2], space,
                                   ctx->saved_data["name"].toStringRef() + " backward");
    variable_list out(11);
    out[0] = x;
    out[1] = weights;
    return out;
  }
};

Pulled dispatch(const Tensor& x, const Tensor& weights, const Tensor& ids, const Tensor& slot_index,
                const Tensor& token_slot, const Tensor& offsets, const Tensor& pairs, const Tensor& peers,
                at::IntArrayRef space, std::string_view name, int64_t max_rows) {
  if (recording({&x, &weights})) {
    const auto out =
        Dispatch::apply(x, weights, ids, slot_index, token_slot, offsets, pairs, peers, space, name, max_rows);
    return {out[0], out[1], out[2], out[3], out[4]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return pull(x, weights, ids, slot_index, offsets, pairs, peers, space, name, max_rows);
}

struct Combine : torch::autograd::Function<Combine> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& layout, const Tensor& slot_index,
                        const Tensor& token_slot, const Tensor& offsets, const Tensor& pairs, const Tensor& peers,
                        at::IntArrayRef space, std::string_view name) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({slot_index, offsets, pairs, peers});
    ctx->saved_data["space"] = space.vec();
    ctx->saved_data["name"] = std::string(name);
    ctx->saved_data["rows"] = rows.size(0);
    return std::get<0>(push(rows, std::nullopt, layout, token_slot, peers, space, name));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto space = ctx->saved_data["space"].toIntVector();
    variable_list out(9);
    // as many rows as went forth, so nothing is read on the host
    out[0] = std::get<0>(pull(grads[0], std::nullopt, std::nullopt, saved[0], saved[1], saved[2], saved[3], space,
                              ctx->saved_data["name"].toStringRef() + " backward", ctx->saved_data["rows"].toInt()));
    return out;
  }
};

Tensor combine(const Tensor& rows, const Tensor& layout, const Tensor& slot_index, const Tensor& token_slot,
               const Tensor& offsets, const Tensor& pairs, const Tensor& peers, at::IntArrayRef space,
               std::string_view name) {
  if (recording({&rows}))
    return Combine::apply(rows, layout, slot_index, token_slot, offsets, pairs, peers, space, name);
  at::AutoDispatchBelowADInplaceOrView guard;
  return std::get<0>(push(rows, std::nullopt, layout, token_slot, peers, space, name));
}

// Without autograd.
Pulled dispatch_inference(const Tensor& x, const Tensor& weights, const Tensor& ids, const Tensor& slot_index,
                          const Tensor& /*token_slot*/, const Tensor& offsets, const Tensor& pairs, const Tensor& peers,
                          at::IntArrayRef space, std::string_view name, int64_t max_rows) {
  return pull(x, weights, ids, slot_index, offsets, pairs, peers, space, name, max_rows);
}

Tensor combine_inference(const Tensor& rows, const Tensor& layout, const Tensor& /*slot_index*/,
                         const Tensor& token_slot, const Tensor& /*offsets*/, const Tensor& /*pairs*/,
                         const Tensor& peers, at::IntArrayRef space, std::string_view name) {
  return std::get<0>(push(rows, std::nullopt, layout, token_slot, peers, space, name));
}

}  // namespace
}  // namespace fastmoe_cpp::autograd

TORCH_LIBRARY_IMPL(fastmoe_cpp_symmetric, Autograd, m) {
  using fastmoe_cpp::autograd::not_differentiable;
  using fastmoe_cpp::autograd::refuse_double_backward;
  m.impl("token_ranks", torch::CppFunction::makeFromBoxedFunction<&not_differentiable>());
  m.impl("pull", torch::CppFunction::makeFromBoxedFunction<&refuse_double_backward>());
  m.impl("push", torch::CppFunction::makeFromBoxedFunction<&refuse_double_backward>());
  m.impl("dispatch", fastmoe_cpp::autograd::dispatch);
  m.impl("combine", fastmoe_cpp::autograd::combine);
}

TORCH_LIBRARY_IMPL(fastmoe_cpp_symmetric, CompositeExplicitAutograd, m) {
  m.impl("dispatch", fastmoe_cpp::autograd::dispatch_inference);
  m.impl("combine", fastmoe_cpp::autograd::combine_inference);
}
