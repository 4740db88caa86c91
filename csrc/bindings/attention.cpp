// engine._kernels: attention over pages. Arrays are numpy's: float32, or uint16 that holds
// bfloat16. A wrong dtype or shape is a ValueError that names the argument.
#include "attention/attention.h"

#include <cmath>

#include "bindings/kernels.h"

namespace py = pybind11;
namespace kvc2 {
namespace {

attention::Pages shape_of(const py::array& pages) {
  check_array(pages, "key_pages", pages.dtype(), {-1, -1, -1, -1});
  return {size(pages.shape(0)), size(pages.shape(1)), size(pages.shape(2)), size(pages.shape(3))};
}

// What a step's layers share: how long each sequence is, and where its pages are.
struct Sequences {
  const ArrayOf<int32_t>& query_lens;
  const ArrayOf<int32_t>& context_lens;
  const ArrayOf<int32_t>& block_tables;
};

void check_sequences(const Sequences& s, const attention::Pages& shape, py::ssize_t tokens) {
  const auto count = s.query_lens.size();
  check_array(s.query_lens, "query_lens", s.query_lens.dtype(), {-1});
  check_array(s.context_lens, "context_lens", s.context_lens.dtype(), {count});
  check_array(s.block_tables, "block_tables", s.block_tables.dtype(), {count, -1});
  const auto room = size(s.block_tables.shape(1)) * shape.page_size;
  py::ssize_t total = 0;
  for (py::ssize_t i = 0; i < count; ++i) {
    const int32_t queries = s.query_lens.data()[i], context = s.context_lens.data()[i];
    if (queries < 1 || context < queries || size(context) > room) {
      throw py::value_error("context_lens must hold query_lens and fit block_tables");
    }
    total += queries;
  }
  if (total != tokens) throw py::value_error("query_lens must sum to the queries");
  for (py::ssize_t i = 0; i < s.block_tables.size(); ++i) {
    const int32_t page = s.block_tables.data()[i];
    if (page < 0 || size(page) >= shape.pages) {
      throw py::value_error("block_tables must be under the number of pages");
    }
  }
}

void attend(Workbench& workbench, const py::array& query, const py::array& key,
            const py::array& value, const Sequences& sequences, py::array& output) {
  const attention::Pages shape = shape_of(key);
  check_array(value, "value_pages", key.dtype(),
              {key.shape(0), key.shape(1), key.shape(2), key.shape(3)});
  check_array(query, "query", key.dtype(), {-1, -1, key.shape(3)});
  check_array(output, "output", key.dtype(), {query.shape(0), query.shape(1), query.shape(2)});
  if (shape.kv_heads == 0 || size(query.shape(1)) % shape.kv_heads != 0) {
    throw py::value_error("query must have a multiple of the pages' heads");
  }
  check_sequences(sequences, shape, query.shape(0));
  attention::Attend call{};
  call.type = key.itemsize() == 4 ? attention::Type::kFloat32 : attention::Type::kBfloat16;
  call.shape = shape;
  call.query_heads = size(query.shape(1));
  call.sequences = size(sequences.query_lens.size());
  call.max_pages = size(sequences.block_tables.shape(1));
  call.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  call.query = query.data();
  call.key = key.data();
  call.value = value.data();
  call.query_lens = sequences.query_lens.data();
  call.context_lens = sequences.context_lens.data();
  call.block_tables = sequences.block_tables.data();
  call.output = output.mutable_data();
  const py::gil_scoped_release released;
  const std::lock_guard lock(workbench.mutex);
  attention::kernels(workbench.isa).attend(call, workbench.workspace);
}

struct Places {
  const ArrayOf<int64_t>& page_ids;
  const ArrayOf<int64_t>& offsets;
};

void write(const py::array& key, const py::array& value, const Places& places, py::array& key_pages,
           py::array& value_pages) {
  const attention::Pages shape = shape_of(key_pages);
  const auto tokens = key.ndim() > 0 ? key.shape(0) : 0;
  check_array(value_pages, "value_pages", key_pages.dtype(),
              {key_pages.shape(0), key_pages.shape(1), key_pages.shape(2), key_pages.shape(3)});
  check_array(key, "key", key_pages.dtype(), {-1, key_pages.shape(1), key_pages.shape(3)});
  check_array(value, "value", key_pages.dtype(), {tokens, key.shape(1), key.shape(2)});
  check_array(places.page_ids, "page_ids", places.page_ids.dtype(), {tokens});
  check_array(places.offsets, "offsets", places.offsets.dtype(), {tokens});
  for (py::ssize_t i = 0; i < tokens; ++i) {
    const int64_t page = places.page_ids.data()[i], offset = places.offsets.data()[i];
    if (page < 0 || page >= key_pages.shape(0) || offset < 0 || offset >= key_pages.shape(2)) {
      throw py::value_error("page_ids and offsets must lie in the pages");
    }
  }
  const attention::Write call{size(key.itemsize()),
                              shape,
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
  module.def("attend", [](Workbench& workbench, const py::array& query, const py::array& key_pages,
                          const py::array& value_pages, const ArrayOf<int32_t>& query_lens,
                          const ArrayOf<int32_t>& context_lens,
                          const ArrayOf<int32_t>& block_tables, py::array& output) {
    attend(workbench, query, key_pages, value_pages, {query_lens, context_lens, block_tables},
           output);
  });
  module.def("write",
             [](const py::array& key, const py::array& value, const ArrayOf<int64_t>& page_ids,
                const ArrayOf<int64_t>& offsets, py::array& key_pages, py::array& value_pages) {
               write(key, value, {page_ids, offsets}, key_pages, value_pages);
             });
}
