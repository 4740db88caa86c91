// What attention and decoder take of a step: sequences over pages, and places in pages. Each check
// throws ValueError with the argument's name.
#pragma once

#include <pybind11/numpy.h>

#include <string>

#include "attention/attention.h"
#include "bindings/kernels.h"

namespace kvc2 {

// Pages as an array has them; what lies between one key (or value) and the next may be others'.
inline attention::Pages pages_of(const pybind11::array& pages, const char* name) {
  const std::string argument(name);
  if (pages.ndim() != 4) throw pybind11::value_error(argument + " has a wrong shape");
  const auto element = pages.itemsize(), row = pages.strides(2);
  const bool in_order = pages.strides(3) == element && row % element == 0 &&
                        row >= pages.shape(3) * element &&
                        pages.strides(1) == pages.shape(2) * row &&
                        pages.strides(0) == pages.shape(1) * pages.strides(1);
  if (!in_order) throw pybind11::value_error(argument + " is not contiguous");
  return {size(pages.shape(0)), size(pages.shape(1)), size(pages.shape(2)), size(pages.shape(3)),
          size(row / element)};
}

// What a step's layers share: how long each sequence is, and where its pages are.
struct Sequences {
  const ArrayOf<int32_t>& query_lens;
  const ArrayOf<int32_t>& context_lens;
  const ArrayOf<int32_t>& block_tables;
};

inline void check_sequences(const Sequences& s, const attention::Pages& shape,
                            pybind11::ssize_t tokens) {
  const auto count = s.query_lens.size();
  check_array(s.query_lens, "query_lens", s.query_lens.dtype(), {-1});
  check_array(s.context_lens, "context_lens", s.context_lens.dtype(), {count});
  check_array(s.block_tables, "block_tables", s.block_tables.dtype(), {count, -1});
  const auto room = size(s.block_tables.shape(1)) * shape.page_size;
  pybind11::ssize_t total = 0;
  for (pybind11::ssize_t i = 0; i < count; ++i) {
    const int32_t queries = s.query_lens.data()[i], context = s.context_lens.data()[i];
    if (queries < 1 || context < queries || size(context) > room) {
      throw pybind11::value_error("context_lens must hold query_lens and fit block_tables");
    }
    total += queries;
  }
  if (total != tokens) throw pybind11::value_error("query_lens must sum to the queries");
  for (pybind11::ssize_t i = 0; i < s.block_tables.size(); ++i) {
    const int32_t page = s.block_tables.data()[i];
    if (page < 0 || size(page) >= shape.pages) {
      throw pybind11::value_error("block_tables must be under the number of pages");
    }
  }
}

struct Places {
  const ArrayOf<int64_t>& page_ids;
  const ArrayOf<int64_t>& offsets;
};

inline void check_places(const Places& places, const attention::Pages& pages,
                         pybind11::ssize_t tokens) {
  check_array(places.page_ids, "page_ids", places.page_ids.dtype(), {tokens});
  check_array(places.offsets, "offsets", places.offsets.dtype(), {tokens});
  for (pybind11::ssize_t i = 0; i < tokens; ++i) {
    const int64_t page = places.page_ids.data()[i], offset = places.offsets.data()[i];
    if (page < 0 || size(page) >= pages.pages || offset < 0 || size(offset) >= pages.page_size) {
      throw pybind11::value_error("page_ids and offsets must lie in the pages");
    }
  }
}

}  // namespace kvc2
