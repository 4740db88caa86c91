// The module engine._kernels: what attention and experts offer to the engine.
// engine/_kernels.pyi is the contract.
#include "bindings/kernels.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

void bind_attention(pybind11::module_& module);
void bind_decoder(pybind11::module_& module);
void bind_experts(pybind11::module_& module);
void bind_sampler(pybind11::module_& module);

namespace py = pybind11;
namespace {

// The instruction sets that this machine offers, plainest first.
std::vector<kvc2::Isa> offered() {
  std::vector<kvc2::Isa> sets;
  for (int level = 0; level <= static_cast<int>(kvc2::cpu().isa); ++level) {
    sets.push_back(static_cast<kvc2::Isa>(level));
  }
  return sets;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const kvc2::Isa isa : offered()) names.emplace_back(kvc2::isa_name(isa));
  return names;
}

std::unique_ptr<kvc2::Workbench> make_workbench(const std::string& name, size_t threads) {
  if (threads < 1 || threads > 1024) throw py::value_error("threads must be 1 to 1024");
  for (const kvc2::Isa isa : offered()) {
    if (kvc2::isa_name(isa) == name) return std::make_unique<kvc2::Workbench>(isa, threads);
  }
  throw py::value_error("this machine has no instruction set '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
  module.def("instruction_sets", &instruction_sets);
  py::class_<kvc2::Workbench>(module, "Workbench")
      .def(py::init(&make_workbench), py::arg("instruction_set"), py::arg("threads"));
  bind_attention(module);
  bind_decoder(module);
  bind_experts(module);
  bind_sampler(module);
}
