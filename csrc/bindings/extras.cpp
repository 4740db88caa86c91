// kvc2._core, part "extras": what a prompt is made of beside its tokens. The contract is
// kvc2/_core.pyi.
#include "bindings/extras.h"

#include "bindings/arrays.h"

namespace py = pybind11;
using namespace py::literals;
using namespace kvc2;
using bindings::PromptExtras;

static PromptExtras extras_of(const py::object& blocks, const py::object& digests) {
  const auto at = bindings::elements<uint32_t>(blocks, "blocks", {bindings::kAnyLength});
  const auto rows = static_cast<py::ssize_t>(at.size());
  const auto bytes = bindings::elements<uint8_t>(digests, "digests", {rows, sizeof(Digest)});
  const auto* names = reinterpret_cast<const Digest*>(bytes.data());
  PromptExtras extras;
  for (size_t i = 0; i < at.size(); ++i) {
    if (i > 0 && at[i] <= at[i - 1]) throw py::value_error("blocks are not rising");
    if (names[i] == Digest{}) throw py::value_error("digests has zeros, which mean none");
    extras.rows.push_back({at[i], names[i]});
  }
  return extras;
}

void bind_extras(py::module_& module) {
  py::class_<PromptExtras>(module, "PromptExtras")
      .def(py::init(&extras_of), "blocks"_a, "digests"_a);
}
