// engine._kernels: attention over pages. Arrays are numpy's: float32, or uint16 that holds
// bfloat16. A wrong dtype or shape is a ValueError that names the argument.
#include "attention/attention.h"

#include <pybind11/stl.h>

#include <cmath>
#include <optional>

#include "bindings/kernels.h"
#include "bindings/sequences.h"

namespace py = pybind11;
namespace kvc2 {
namespace {

void check_values(const py::array& values, const py::array& keys) {
  if (!values.dtype().is(keys.dtype())) throw py::value_error("value_pages has another dtype");
  for (int i = 0; i < 3; ++i) {
    if (values.shape(i) != keys.shape(i)) throw py::value_error("value_pages has a wrong shape");
  }
}

// As attention::Scores; no scale: 1 / sqrt(size of a key).
struct Options {
  const std::optional<float>& scale;
  float soft_cap;
  int64_t window;
  const std::optional<ArrayOf<float>>& sinks;
};

attention::Scores scores_of(const Options& options, size_t key_size, py::ssize_t query_heads) {
  if (!(options.soft_cap >= 0)) throw py::value_error("soft_cap must not be negative");
  if (options.window < 0) throw py::value_error("window must not be negative");
  const float plain = 1.0f / std::sqrt(static_cast<float>(key_size));
  attention::Scores scores{options.scale.value_or(plain), options.soft_cap,
                           static_cast<size_t>(options.window), nullptr};
  if (options.sinks) {
    check_array(*options.sinks, "sinks", options.sinks->dtype(), {query_heads});
    scores.sinks = options.sinks->data();
  }
  return scores;
}

struct Operands {
  const py::array& query;
  const py::array& key;
  const py::array& value;
  py::array& output;
};

void attend(Workbench& workbench, const Operands& x, const Sequences& sequences,
            const Options& options) {
  attention::Attend call{};
  call.keys = pages_of(x.key, "key_pages");
  call.values = pages_of(x.value, "value_pages");
  check_values(x.value, x.key);
  check_array(x.query, "query", x.key.dtype(), {-1, -1, x.key.shape(3)});
  check_array(x.output, "output", x.key.dtype(),
              {x.query.shape(0), x.query.shape(1), x.value.shape(3)});
  if (call.keys.kv_heads == 0 || size(x.query.shape(1)) % call.keys.kv_heads != 0) {
    throw py::value_error("query must have a multiple of the pages' heads");
  }
  check_sequences(sequences, call.keys, x.query.shape(0));
  call.type = x.key.itemsize() == 4 ? attention::Type::kFloat32 : attention::Type::kBfloat16;
  call.scores = scores_of(options, call.keys.size, x.query.shape(1));
  call.query_heads = size(x.query.shape(1));
  call.sequences = size(sequences.query_lens.size());
  call.max_pages = size(sequences.block_tables.shape(1));
  call.query = x.query.data();
  call.key = x.key.data();
  call.value = x.value.data();
  call.query_lens = sequences.query_lens.data();
  call.context_lens = sequences.context_lens.data();
  call.block_tables = sequences.block_tables.data();
  call.output = x.output.mutable_data();
  const py::gil_scoped_release released;
  const std::lock_guard lock(workbench.mutex);
  attention::kernels(workbench.isa).attend(call, workbench.workspace);
}

void write(const py::array& key, const py::array& value, const Places& places, py::array& key_pages,
           py::array& value_pages) {
  const attention::Pages keys = pages_of(key_pages, "key_pages");
  const attention::Pages values = pages_of(value_pages, "value_pages");
  const auto tokens = key.ndim() > 0 ? key.shape(0) : 0;
  check_values(value_pages, key_pages);
  check_array(key, "key", key_pages.dtype(), {-1, key_pages.shape(1), key_pages.shape(3)});
  check_array(value, "value", key_pages.dtype(), {tokens, key.shape(1), value_pages.shape(3)});
  check_places(places, keys, tokens);
  const attention::Write call{size(key.itemsize()),
                              keys,
                              values,
                              size(tokens),
                              key.data(),
                              value.data(),
                              places.page_ids.data(),
                              places.offsets.data(),
                              key_pages.mutable_data(),
                              value_pages.mutable_data()};
  const py::gil_scoped_release released;
  attention::write(call);
}

}  // namespace
}  // namespace kvc2

void bind_attention(pybind11::module_& module) {
  using namespace kvc2;
  module.def(
      "attend",
      [](Workbench& workbench, const py::array& query, const py::array& key_pages,
         const py::array& value_pages, const ArrayOf<int32_t>& query_lens,
         const ArrayOf<int32_t>& context_lens, const ArrayOf<int32_t>& block_tables,
         py::array& output, const std::optional<float>& scale, float soft_cap, int64_t window,
         const std::optional<ArrayOf<float>>& sinks) {
        attend(workbench, {query, key_pages, value_pages, output},
               {query_lens, context_lens, block_tables}, {scale, soft_cap, window, sinks});
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::pos_only(), py::kw_only(), py::arg("scale") = py::none(), py::arg("soft_cap") = 0.0f,
      py::arg("window") = 0, py::arg("sinks") = py::none());
  module.def("write",
             [](const py::array& key, const py::array& value, const ArrayOf<int64_t>& page_ids,
                const ArrayOf<int64_t>& offsets, py::array& key_pages, py::array& value_pages) {
               write(key, value, {page_ids, offsets}, key_pages, value_pages);
             });
}
