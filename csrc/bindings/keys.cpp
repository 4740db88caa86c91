// kvc2._core, part "keys": blocks that their engine names itself. The contract is kvc2/_core.pyi.
#include <pybind11/stl.h>

#include "bindings/arrays.h"
#include "index/index.h"

namespace py = pybind11;
using namespace py::literals;
using namespace kvc2;
using bindings::answers_of;
using bindings::array_of;
using bindings::unlocked;

static py::value_error wrong_key(size_t i, size_t bytes) {
  return py::value_error("keys[" + std::to_string(i) + "]: " + std::to_string(bytes) +
                         " bytes, not 1 to " + std::to_string(kOpaqueKeyMax));
}

// A sequence of bytes objects, such as a list or a repeated field.
static std::vector<KeyBlock> blocks_of(const py::object& keys) {
  if (!PySequence_Check(keys.ptr()) || PyBytes_Check(keys.ptr()) || PyUnicode_Check(keys.ptr())) {
    throw py::type_error("keys: not a sequence of bytes objects");
  }
  const auto sequence = py::reinterpret_borrow<py::sequence>(keys);
  const size_t count = sequence.size();
  std::vector<KeyBlock> blocks;
  blocks.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const py::object key = sequence[i];
    if (!PyBytes_Check(key.ptr())) {
      throw py::type_error("keys[" + std::to_string(i) + "]: not a bytes object");
    }
    const auto bytes = static_cast<size_t>(PyBytes_GET_SIZE(key.ptr()));
    if (bytes == 0 || bytes > kOpaqueKeyMax) throw wrong_key(i, bytes);
    blocks.push_back(
        key_block({reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(key.ptr())), bytes}));
  }
  return blocks;
}

static py::array_t<uint8_t> commit(Index& self, uint32_t space, PoolId pool, const py::object& keys,
                                   const py::object& pages, std::optional<LeaseId> lease,
                                   const Hints& hints) {
  const auto blocks = blocks_of(keys);
  const auto ids = bindings::elements<uint32_t>(pages, "pages", {bindings::kAnyLength});
  return answers_of(
      unlocked([&] { return self.commit_keys(space, pool, blocks, ids, lease, hints); }));
}

static void bind_pins_of_keys(py::class_<Index>& index) {
  index
      .def(
          "pin_keys",
          [](Index& self, uint32_t space, PoolId pool, const py::object& keys, bool hard,
             uint32_t max_blocks, uint32_t ttl, bool keep_stronger) {
            const auto blocks = blocks_of(keys);
            const Keeping as{hard, max_blocks, ttl, keep_stronger};
            return array_of(unlocked([&] { return self.pin_keys(space, pool, blocks, as); }));
          },
          "namespace"_a, "pool"_a, "keys"_a, py::kw_only(), "hard"_a, "max_blocks"_a, "ttl_s"_a = 0,
          "keep_stronger"_a = false)
      .def(
          "unpin_keys",
          [](Index& self, uint32_t space, PoolId pool, const py::object& keys) {
            const auto blocks = blocks_of(keys);
            return array_of(unlocked([&] { return self.unpin_keys(space, pool, blocks); }));
          },
          "namespace"_a, "pool"_a, "keys"_a);
}

void bind_keys(py::module_& module, py::class_<Index>& index) {
  module.attr("NO_PAGE") = kNoPage;
  module.attr("OPAQUE_KEY_MAX") = kOpaqueKeyMax;
  py::class_<KeyLeaseView>(module, "KeyLease")
      .def_readonly("id", &KeyLeaseView::id)
      .def_property_readonly("found", [](const KeyLeaseView& l) { return array_of(l.found); })
      .def_property_readonly("pages", [](const KeyLeaseView& l) { return array_of(l.pages); })
      .def_property_readonly("arrived", [](const KeyLeaseView& l) { return array_of(l.arrived); })
      .def_readonly("transfer", &KeyLeaseView::transfer);
  index
      .def(
          "match_keys",
          [](const Index& self, uint32_t space, PoolId pool, const py::object& keys) {
            const auto blocks = blocks_of(keys);
            return array_of(unlocked([&] { return self.match_keys(space, pool, blocks); }));
          },
          "namespace"_a, "pool"_a, "keys"_a)
      .def(
          "explain_keys",
          [](const Index& self, uint32_t space, const std::vector<PoolId>& pools,
             const py::object& keys) {
            const auto blocks = blocks_of(keys);
            return unlocked([&] { return self.explain_keys(space, pools, blocks); });
          },
          "namespace"_a, "pools"_a, "keys"_a)
      .def(
          "acquire_keys",
          [](Index& self, uint32_t space, PoolId pool, const py::object& keys, const Hints& hints,
             bool touches) {
            const auto blocks = blocks_of(keys);
            return unlocked([&] { return self.acquire_keys(space, pool, blocks, hints, touches); });
          },
          "namespace"_a, "pool"_a, "keys"_a, "hints"_a = Hints{}, py::kw_only(), "touches"_a = true)
      .def("key_lease", &Index::key_lease, "lease"_a, py::call_guard<py::gil_scoped_release>())
      .def("commit_keys", &commit, "namespace"_a, "pool"_a, "keys"_a, "pages"_a, py::kw_only(),
           "lease"_a = py::none(), "hints"_a = Hints{})
      .def(
          "prefetch_keys",
          [](Index& self, uint32_t space, PoolId pool, const py::object& keys, uint32_t max_pages,
             bool touches) {
            const auto blocks = blocks_of(keys);
            return unlocked(
                [&] { return self.prefetch_keys(space, pool, blocks, max_pages, touches); });
          },
          "namespace"_a, "pool"_a, "keys"_a, "max_pages"_a, py::kw_only(), "touches"_a);
  index.def(
      "grant_for_keys",
      [](Index& self, LeaseId lease, const py::object& keys) {
        const auto blocks = blocks_of(keys);
        return array_of<uint32_t>(unlocked([&] { return self.grant_for_keys(lease, blocks); }));
      },
      "lease"_a, "keys"_a);
  bind_pins_of_keys(index);
}
