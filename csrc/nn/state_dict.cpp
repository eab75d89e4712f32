#include "state_dict.h"

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/csrc/jit/serialization/pickler.h>

#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

namespace fastmoe_cpp {
namespace {

torch::OrderedDict<std::string, at::Tensor> tensors_of(const torch::nn::Module& module) {
  auto tensors = module.named_parameters();
  for (const auto& buffer : module.named_buffers()) tensors.insert(buffer.key(), buffer.value());
  return tensors;
}

}  // namespace

void save_state_dict(const torch::nn::Module& module, const std::string& path) {
  c10::Dict<std::string, at::Tensor> state;
  for (const auto& item : tensors_of(module))
    state.insert(item.key(), item.value().detach().cpu().contiguous().clone());
  // torch::pickle_save tags a dictionary with its TorchScript type, which torch.load(weights_only=True) refuses.
  std::vector<char> pickled;
  torch::jit::Pickler pickler(
      [&](const char* bytes, size_t size) { pickled.insert(pickled.end(), bytes, bytes + size); }, nullptr, nullptr,
      nullptr, nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(state);
  pickler.stop();
  std::ofstream file(path, std::ios::binary);
  TORCH_CHECK_VALUE(file.good(), "path must name a file that can be written, got ", path);
  caffe2::serialize::PyTorchStreamWriter archive([&](const void* bytes, size_t size) {
    file.write(static_cast<const char*>(bytes), static_cast<std::streamsize>(size));
    return file.good() ? size : 0;
  });
  archive.writeRecord("data.pkl", pickled.data(), pickled.size());
  size_t i = 0;
  for (const auto& tensor : pickler.tensorData())
    archive.writeRecord("data/" + std::to_string(i++), tensor.storage().data(), tensor.storage().nbytes());
  archive.writeEndOfFile();
  file.close();
  TORCH_CHECK(file.good(), "the state dict could not be written to ", path);
}

void load_state_dict(torch::nn::Module& module, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK_VALUE(file.good(), "path must name a state dict, got ", path, " which cannot be read");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  c10::IValue loaded;
  try {
    loaded = torch::jit::pickle_load(bytes);
  } catch (const std::exception&) {
    TORCH_CHECK_VALUE(false, path, " must hold torch.save(dict(module.state_dict())), and could not be read as that");
  }
  TORCH_CHECK_VALUE(loaded.isGenericDict(), path, " must hold a dictionary of tensors, got ", loaded.tagKind());
  auto mine = tensors_of(module);
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  for (const auto& item : loaded.toGenericDict()) {
    TORCH_CHECK_VALUE(item.key().isString() && item.value().isTensor(), path,
                      " must hold a dictionary of tensors by name, got ", item.key().tagKind(), " to ",
                      item.value().tagKind());
    const auto& name = item.key().toStringRef();
    const auto tensor = item.value().toTensor();
    const auto* target = mine.find(name);
    TORCH_CHECK_VALUE(target, path, " has '", name, "', which the module has not");
    TORCH_CHECK_VALUE(target->sizes() == tensor.sizes(), name, " must have shape ", target->sizes(), ", got ",
                      tensor.sizes(), " in ", path);
    copies.emplace_back(*target, tensor);
  }
  for (const auto& item : mine)
    TORCH_CHECK_VALUE(loaded.toGenericDict().contains(item.key()), path, " lacks '", item.key(), "'");
  torch::NoGradGuard guard;
  for (auto& [target, tensor] : copies) target.copy_(tensor);
}

}  // namespace fastmoe_cpp
