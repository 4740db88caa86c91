// kvc2._core, part "KV events": what routers are told. The contract is kvc2/_core.pyi.
#include "bindings/arrays.h"
#include "index/index.h"

namespace py = pybind11;
using namespace py::literals;
using namespace kvc2;
using bindings::array_of;
using bindings::unlocked;

template <size_t N>
static py::array_t<uint8_t> rows_of(const std::vector<std::array<uint8_t, N>>& names) {
  return py::array_t<uint8_t>({static_cast<py::ssize_t>(names.size()), static_cast<py::ssize_t>(N)},
                              reinterpret_cast<const uint8_t*>(names.data()));
}

void bind_kv_events(py::module_& module, py::class_<Index>& index) {
  module.attr("KV_CLEARED") = static_cast<int>(KvEventKind::kCleared);
  module.attr("KV_STORED") = static_cast<int>(KvEventKind::kStored);
  module.attr("KV_REMOVED") = static_cast<int>(KvEventKind::kRemoved);
  py::class_<KvEvents>(module, "KvEvents")
      .def_property_readonly("kinds", [](const KvEvents& e) { return array_of(e.kinds); })
      .def_property_readonly("tiers", [](const KvEvents& e) { return array_of(e.tiers); })
      .def_property_readonly("opaque", [](const KvEvents& e) { return array_of(e.opaque); })
      .def_property_readonly("page_sizes", [](const KvEvents& e) { return array_of(e.page_sizes); })
      .def_property_readonly("words_of", [](const KvEvents& e) { return array_of(e.words_of); })
      .def_property_readonly("words", [](const KvEvents& e) { return array_of(e.words); })
      .def_property_readonly("namespaces", [](const KvEvents& e) { return rows_of(e.namespaces); })
      .def_property_readonly("extras", [](const KvEvents& e) { return rows_of(e.extras); })
      .def_property_readonly("keys", [](const KvEvents& e) { return rows_of(e.keys); })
      .def_property_readonly("parents", [](const KvEvents& e) { return rows_of(e.parents); });
  index
      .def(
          "take_kv_events",
          [](Index& self, uint32_t scan_pages) {
            if (scan_pages == 0) throw py::value_error("scan_pages: at least 1");
            auto taken = unlocked([&] { return self.take_kv_events(scan_pages); });
            return py::make_tuple(std::move(taken.first), taken.second);
          },
          "scan_pages"_a = Index::kSlicePages)
      .def("tell_kv_events_anew", &Index::tell_kv_events_anew,
           py::call_guard<py::gil_scoped_release>())
      .def("kv_event_overflows", &Index::kv_event_overflows,
           py::call_guard<py::gil_scoped_release>());
}
