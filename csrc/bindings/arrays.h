// Arguments of the bindings as spans of memory: dtype, shape and order are checked by name, nothing
// is converted or copied. The checks need the GIL; the spans live on without it, as long as the
// object that was checked. Results are copied into new arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvc2::bindings {

constexpr pybind11::ssize_t kAnyLength = -1;

// Runs `work` without the GIL.
template <class Work>
auto unlocked(Work&& work) {
  const pybind11::gil_scoped_release release;
  return work();
}

template <class T>
pybind11::array_t<T> array_of(std::span<const T> values) {
  return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(values.size()), values.data());
}

template <class T>
pybind11::array_t<T> array_of(const std::vector<T>& values) {
  return array_of(std::span<const T>(values));
}

// Enums of one byte as their numbers.
template <class Answer>
pybind11::array_t<uint8_t> answers_of(const std::vector<Answer>& answers) {
  static_assert(sizeof(Answer) == 1);
  return array_of(std::span(reinterpret_cast<const uint8_t*>(answers.data()), answers.size()));
}

// Elements of a C-contiguous array of T with this shape. TypeError or ValueError names `name`.
template <class T>
std::span<const T> elements(const pybind11::handle& object, const char* name,
                            const std::vector<pybind11::ssize_t>& shape) {
  if (!pybind11::isinstance<pybind11::array_t<T>>(object)) {
    throw pybind11::type_error(std::string(name) + " is not an array of dtype " +
                               std::string(pybind11::str(pybind11::dtype::of<T>())));
  }
  const auto array = pybind11::reinterpret_borrow<pybind11::array>(object);
  bool fits = array.ndim() == static_cast<pybind11::ssize_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i] == kAnyLength || array.shape(static_cast<pybind11::ssize_t>(i)) == shape[i];
  }
  if (!fits) {
    std::string wanted;
    for (const auto length : shape) {
      if (!wanted.empty()) wanted += ", ";
      wanted += length < 0 ? std::string("any") : std::to_string(length);
    }
    throw pybind11::value_error(std::string(name) + " has shape " +
                                std::string(pybind11::str(array.attr("shape"))) + ", not [" +
                                wanted + "]");
  }
  constexpr int kWanted = pybind11::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ |
                          pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & kWanted) != kWanted) {
    throw pybind11::value_error(std::string(name) + " is not C-contiguous and aligned");
  }
  return {static_cast<const T*>(array.data()), static_cast<size_t>(array.size())};
}

// The memory of any object with the buffer protocol, held exported until the end of the scope.
class Exported {
 public:
  Exported(const pybind11::handle& object, const char* name, bool writable) {
    const int flags = writable ? PyBUF_SIMPLE | PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) == 0) return;
    PyErr_Clear();
    throw pybind11::type_error(std::string(name) + " is not a " + (writable ? "writable, " : "") +
                               "contiguous buffer");
  }
  ~Exported() { PyBuffer_Release(&view_); }
  Exported(const Exported&) = delete;
  Exported& operator=(const Exported&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  size_t bytes() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_;
};

}  // namespace kvc2::bindings
