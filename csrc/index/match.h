// Which leading blocks of some tokens are resident in some pools, and in which. Changes nothing.
// Costs: one hash a node of the path, and one look a block and pool (less where a node's blocks are
// all there).
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "index/radix_tree.h"

namespace kvc2 {

struct Match {
  uint32_t blocks = 0;
  std::vector<uint32_t> tiers;  // by pool of the chain: blocks whose fastest page is there
};

// The leading blocks that are resident in one of some pools and match: a dead block ends them (I8).
struct Found {
  uint32_t space;
  std::vector<Run> path{};
  std::vector<uint8_t> tiers{};   // by block: position among the pools of the fastest that has it
  Place last;                     // the last of these blocks, or where the path begins
  std::optional<Place> passed{};  // the next block, if it is in the tree all the same
};

// `path` is what the tree finds of the tokens; `pools` are at most 255, fastest first.
Found find_resident(const RadixTree& tree, uint32_t space, std::span<const PoolId> pools,
                    const std::vector<Run>& path);

}  // namespace kvc2
