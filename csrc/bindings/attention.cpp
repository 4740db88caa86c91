#include <pybind11/pybind11.h>

void bind_attention(pybind11::module_&) {}
