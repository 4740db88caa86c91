// The module engine._kernels: what attention and experts offer to the engine.
// engine/_kernels.pyi is the contract.
#include <pybind11/pybind11.h>

void bind_attention(pybind11::module_& module);
void bind_experts(pybind11::module_& module);

PYBIND11_MODULE(_kernels, module) {
  bind_attention(module);
  bind_experts(module);
}
