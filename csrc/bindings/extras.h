// The extras of a prompt's blocks as an argument: None, or a PromptExtras that its caller has made.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <vector>

#include "index/block_key.h"

namespace kvc2::bindings {

struct PromptExtras {
  std::vector<BlockExtras> rows;  // rising by block
};

// Not a pointer: pybind11 would look a None up among the types of other modules, which takes 0.8 us
// of a call.
using GivenExtras = pybind11::typing::Optional<PromptExtras>;

// Those of the argument, which keeps them.
inline Extras rows_of(const GivenExtras& extras) {
  if (extras.is_none()) return {};
  if (!pybind11::isinstance<PromptExtras>(extras)) {
    throw pybind11::type_error("extras is neither None nor PromptExtras");
  }
  return Extras(extras.cast<const PromptExtras&>().rows);
}

}  // namespace kvc2::bindings
