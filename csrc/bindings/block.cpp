#include <pybind11/pybind11.h>

void bind_block(pybind11::module_&) {}
