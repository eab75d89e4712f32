// The typed handle of a registered operator: FASTMOE_OP(route) in the body of the function `route` of the same signature.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#define FASTMOE_OP(name)                                                                                   \
  ([]() -> const auto& {                                                                                   \
    static const auto op =                                                                                 \
        c10::Dispatcher::singleton().findSchemaOrThrow("fastmoe_cpp::" #name, "").typed<decltype(name)>(); \
    return op;                                                                                             \
  }())
