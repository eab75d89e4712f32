// State dicts that travel between C++ and Python: plain dictionaries of tensors by parameter name, in torch.save's format.
//
//   C++ to Python   fastmoe_cpp::save_state_dict(*layer, "layer.pt");   layer.load_state_dict(torch.load("layer.pt"))
//   Python to C++   torch.save(dict(layer.state_dict()), "layer.pt");   fastmoe_cpp::load_state_dict(*layer, "layer.pt")
#pragma once
#include <torch/nn/module.h>

#include <string>

namespace fastmoe_cpp {

// Parameters and buffers of a module, on the CPU. Throws c10::ValueError where the path cannot be
// opened for writing, and c10::Error where writing fails.
void save_state_dict(const torch::nn::Module& module, const std::string& path);

// Copies a saved state dict into a module, whatever devices and dtypes the module's tensors have. Throws c10::ValueError,
// with the module unchanged, where a name is missing or not the module's, or a shape differs. Only tensors are read from
// the file: nothing in it is executed.
void load_state_dict(torch::nn::Module& module, const std::string& path);

}  // namespace fastmoe_cpp
