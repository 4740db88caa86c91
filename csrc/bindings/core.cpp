// The module kvc2._core: what index, block and copy offer to the daemon, and the engine's
// heartbeat. Each floor binds itself in its own file; kvc2/_core.pyi is the contract of all.
#include <pybind11/pybind11.h>

void bind_index(pybind11::module_& module);
void bind_block(pybind11::module_& module);
void bind_copy(pybind11::module_& module);
void bind_beat(pybind11::module_& module);

PYBIND11_MODULE(_core, module) {
  bind_index(module);
  bind_block(module);
  bind_copy(module);
  bind_beat(module);
}
