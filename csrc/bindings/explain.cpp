// kvc2._core, part "explain": why a prefix is not there. The contract is kvc2/_core.pyi.
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "bindings/extras.h"
#include "index/index.h"

namespace py = pybind11;
using namespace py::literals;
using namespace kvc2;

static py::object death_of(const Explanation& e) {
  return e.miss.death ? py::cast(*e.miss.death) : py::none();
}

static py::object sibling_of(const Explanation& e) {
  return e.miss.sibling ? py::cast(*e.miss.sibling) : py::none();
}

static py::array runs_of(const Explanation& e) {
  static_assert(sizeof(TierRun) == 2 * sizeof(uint32_t));
  return py::array_t<uint32_t>({static_cast<py::ssize_t>(e.runs.size()), py::ssize_t{2}},
                               reinterpret_cast<const uint32_t*>(e.runs.data()));
}

static py::array tokens_of(const Sibling& s) {
  return py::array_t<uint32_t>(static_cast<py::ssize_t>(s.tokens.size()), s.tokens.data());
}

static Explanation explain(const Index& self, uint32_t space, const std::vector<PoolId>& pools,
                           const py::object& tokens, const bindings::GivenExtras& extras) {
  const Content prompt(bindings::elements<uint32_t>(tokens, "tokens", {bindings::kAnyLength}),
                       bindings::rows_of(extras));
  const py::gil_scoped_release release;
  return self.explain(space, pools, prompt);
}

void bind_explain(py::module_& module, py::class_<Index>& index) {
  py::enum_<Why>(module, "Why")
      .value("NOTHING", Why::kNothing)
      .value("NEVER_SEEN", Why::kNeverSeen)
      .value("DIVERGED", Why::kDiverged)
      .value("HOLE", Why::kHole)
      .value("ELSEWHERE", Why::kElsewhere)
      .value("ARRIVING", Why::kArriving)
      .value("DIED", Why::kDied);
  py::enum_<Cause>(module, "Cause")
      .value("EVICTED", Cause::kEvicted)
      .value("LOST", Cause::kLost)
      .value("SESSION_ENDED", Cause::kSessionEnded)
      .value("TRANSFER_FAILED", Cause::kTransferFailed)
      .value("INVALIDATED", Cause::kInvalidated)
      .value("EXPIRED", Cause::kExpired)
      .value("NOT_ADMITTED", Cause::kNotAdmitted);
  py::class_<Obituary>(module, "Obituary")
      .def_property_readonly("cause", [](const Obituary& o) { return static_cast<Cause>(o.cause); })
      .def_property_readonly("pool", [](const Obituary& o) { return uint32_t{o.pool}; })
      .def_readonly("when", &Obituary::when)
      .def_property_readonly("worth", [](const Obituary& o) { return o.worths.newcomer; })
      .def_property_readonly("victim_worth", [](const Obituary& o) { return o.worths.victim; });
  py::class_<Sibling>(module, "Sibling")
      .def_readonly("common", &Sibling::common)
      .def_property_readonly("tokens", &tokens_of);
  py::class_<Explanation>(module, "Explanation")
      .def_readonly("blocks", &Explanation::blocks)
      .def_property_readonly("runs", &runs_of)
      .def_property_readonly("why", [](const Explanation& e) { return e.miss.why; })
      .def_property_readonly("death", &death_of)
      .def_property_readonly("sibling", &sibling_of);
  index.def("explain", &explain, "namespace"_a, "pools"_a, "tokens"_a, "extras"_a = py::none())
      .def("page_size", &Index::page_size, "pool"_a, py::call_guard<py::gil_scoped_release>());
}
