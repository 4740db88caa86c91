// What the bindings of engine._kernels share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <mutex>
#include <string>

#include "base/cpu.h"
#include "base/workspace.h"

namespace kvc2 {

// One instruction set, its threads and its scratch memory. Calls from several threads take turns.
struct Workbench {
  Workbench(Isa chosen, size_t threads) : isa(chosen), workspace(threads) {}
  const Isa isa;
  Workspace workspace;
  std::mutex mutex;
};

template <class T>
using ArrayOf = pybind11::array_t<T, pybind11::array::c_style>;

inline size_t size(pybind11::ssize_t n) { return static_cast<size_t>(n); }

// C-contiguous, of this dtype and shape (-1: any). Throws ValueError with the argument's name.
inline void check_array(const pybind11::array& x, const char* name, const pybind11::dtype& dtype,
                        std::initializer_list<pybind11::ssize_t> shape) {
  const std::string argument(name);
  if (x.dtype().kind() != dtype.kind() || x.itemsize() != dtype.itemsize()) {
    throw pybind11::value_error(argument + " has another dtype");
  }
  if (!(x.flags() & pybind11::array::c_style)) {
    throw pybind11::value_error(argument + " is not contiguous");
  }
  bool fits = x.ndim() == static_cast<pybind11::ssize_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    const auto wanted = shape.begin()[i];
    fits = wanted == -1 || wanted == x.shape(static_cast<pybind11::ssize_t>(i));
  }
  if (!fits) throw pybind11::value_error(argument + " has a wrong shape");
}

}  // namespace kvc2
