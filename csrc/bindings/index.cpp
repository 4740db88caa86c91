#include <pybind11/pybind11.h>

void bind_index(pybind11::module_&) {}
