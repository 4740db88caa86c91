#include <pybind11/pybind11.h>

void bind_copy(pybind11::module_&) {}
