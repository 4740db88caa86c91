// The extras of a prompt's blocks as an argument: None, or a PromptExtras that its caller has made.
#pragma once

#include <vector>

#include "index/block_key.h"

namespace kvc2::bindings {

struct PromptExtras {
  std::vector<BlockExtras> rows;  // rising by block
};

inline Extras rows_of(const PromptExtras* extras) {
  return extras ? Extras(extras->rows) : Extras{};
}

}  // namespace kvc2::bindings
