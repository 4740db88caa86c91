#include "index/match.h"

#include <utility>

namespace kvc2 {

// Appends the fastest pool that holds each leading block of the run; stops at one that none holds.
static uint32_t tiers_of(const RadixTree& tree, const Run& run, std::span<const PoolId> pools,
                         std::vector<uint8_t>& tiers) {
  uint32_t end = 0;  // of the blocks whose tier is known
  while (end < run.blocks) {
    Run rest{run.node, run.offset + end, run.blocks - end};
    uint8_t tier = 0;
    uint32_t blocks = tree.resident_blocks(rest, pools[0]);
    while (blocks == 0 && ++tier < pools.size()) {
      // a faster pool that holds later ones has its say about each
      if (!tree.pages(rest, pools[tier - 1]).empty()) rest.blocks = 1;
      blocks = tree.resident_blocks(rest, pools[tier]);
    }
    if (blocks == 0) break;
    tiers.insert(tiers.end(), blocks, tier);
    end += blocks;
  }
  return end;
}

Found find_resident(const RadixTree& tree, uint32_t space, std::span<const PoolId> pools,
                    const std::vector<Run>& path) {
  const bool retired = tree.spaces[space].retired;
  Found found{.space = space, .last = {tree.spaces[space].root, kBeforeFirst}};
  for (Run run : path) {
    const Run living{run.node, run.offset, retired ? 0 : tree.living_blocks(run)};
    const uint32_t matched = tiers_of(tree, living, pools, found.tiers);
    const uint32_t blocks = std::exchange(run.blocks, matched);
    if (run.blocks > 0) {
      found.last = {run.node, run.offset + run.blocks - 1};
      found.path.push_back(run);
    }
    if (run.blocks < blocks) {
      found.passed = Place{run.node, run.offset + run.blocks};
      break;
    }
  }
  return found;
}

}  // namespace kvc2
