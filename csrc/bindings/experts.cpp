#include <pybind11/pybind11.h>

void bind_experts(pybind11::module_&) {}
