// What a request would find, and why its first missing block is not there.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "index/obituaries.h"

namespace kvc2 {

enum class Why : uint8_t {
  kNothing,    // no full block is missing
  kNeverSeen,  // not in the tree, and not among the dead that are remembered
  kDiverged,   // as kNeverSeen, but a resident block stands in its place: `sibling`
  kHole,       // in the tree, above a block that has a page: a fault took it
  kElsewhere,  // resident, but in none of the pools asked for
  kArriving,   // its only pages are still being filled
  kDied,       // it was in the tree, or is there still but is dead: `death`
};

struct TierRun {  // consecutive blocks of one tier (a place in the chain, or among pools asked for)
  uint32_t tier, blocks;
};

// The resident block in the missing one's place that begins most like it.
struct Sibling {
  uint32_t common = 0;  // leading tokens of the block that are the same; all: its extras differ
  std::vector<uint32_t> tokens{};
};

struct Miss {
  Why why = Why::kNothing;
  std::optional<Obituary> death{};  // of kDied; of kHole if the death is remembered
  std::optional<Sibling> sibling{};
};

struct Explanation {
  static constexpr size_t kRunsMax = 64;  // so that a kept explanation is small

  uint32_t blocks = 0;          // leading blocks that are there
  std::vector<TierRun> runs{};  // the first kRunsMax runs of these blocks
  Miss miss{};
};

}  // namespace kvc2
