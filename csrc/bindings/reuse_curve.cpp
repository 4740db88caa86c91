// kvc2._core, part "reuse curve": what caches of other sizes would have hit. The contract is
// kvc2/_core.pyi.
#include "index/reuse_curve.h"

#include "bindings/arrays.h"

namespace py = pybind11;
using namespace py::literals;
using namespace kvc2;

void bind_reuse_curve(py::module_& module) {
  py::class_<ReuseCurve>(module, "ReuseCurve")
      .def(py::init<uint32_t>(), py::kw_only(), "sample_max"_a = ReuseCurve::kSampleMax)
      .def(
          "access",
          [](ReuseCurve& self, const py::object& keys, uint32_t page_size, uint64_t tokens) {
            const auto bytes =
                bindings::elements<uint8_t>(keys, "keys", {bindings::kAnyLength, sizeof(BlockKey)});
            const std::span path(reinterpret_cast<const BlockKey*>(bytes.data()),
                                 bytes.size() / sizeof(BlockKey));
            const py::gil_scoped_release release;
            self.access(path, page_size, tokens);
          },
          "keys"_a, "page_size"_a, "tokens"_a)
      .def("catch_up", &ReuseCurve::catch_up)
      .def("hit_rate", &ReuseCurve::hit_rate, "capacity"_a)
      .def("check", &ReuseCurve::check)
      .def_property_readonly("rate", &ReuseCurve::rate)
      .def_property_readonly("sampled", &ReuseCurve::sampled)
      .def_property_readonly("metadata_bytes", &ReuseCurve::metadata_bytes);
  module.attr("NO_LIMIT") = ReuseCurve::kNoLimit;
}
