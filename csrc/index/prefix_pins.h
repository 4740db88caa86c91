// Prefixes that somebody asked to keep, by pool: soft (their blocks are evicted last) or hard
// (never, within a limit). A pin is on the names of blocks, not on their pages: what is not there
// yet, or was lost to a fault, is pinned when it comes.
//
//     pin A = [b0 b1], hard     pin B = [b0 b1 b2], soft
//     b0, b1: one hard, one soft     b2: one soft     -> without A, B's blocks stay soft
//
// A pin is known by its pool and its last block, so that the same one twice is one. Costs: about 70
// bytes a block of a pin; a look is one hash, and none where a pool has no pins. Not thread-safe:
// the index holds its lock.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "index/block_key.h"
#include "index/page_pool.h"

namespace kvc2 {

enum class Pinned : uint8_t { kNot, kSoft, kHard };

class PrefixPins {
 public:
  // False, and nothing changes, if more than `most` blocks of the pool would be pinned in this way.
  // `keys` is not empty. A pin of the same prefix is replaced.
  bool pin(PoolId pool, uint32_t space, std::vector<BlockKey>&& keys, Pinned how, uint32_t most);
  uint32_t unpin(PoolId pool, const BlockKey& last);  // the blocks of that pin; 0: there is none
  void forget_pool(PoolId pool);
  void forget_space(uint32_t space);
  bool of_space(uint32_t space) const;  // whether there is one

  Pinned of(PoolId pool, const BlockKey& block) const {
    if (pool >= pools_.size() || pools_[pool].blocks.empty()) return Pinned::kNot;
    const auto found = pools_[pool].blocks.find(block);
    if (found == pools_[pool].blocks.end()) return Pinned::kNot;
    return found->second.hard > 0 ? Pinned::kHard : Pinned::kSoft;
  }
  uint32_t blocks(PoolId pool, Pinned how) const;  // distinct ones
  size_t metadata_bytes() const;
  void check() const;

 private:
  struct Counts {
    uint32_t soft = 0, hard = 0;  // pins
  };
  struct Pin {
    uint32_t space;
    Pinned how;
    std::vector<BlockKey> keys;
  };
  struct OfPool {
    std::unordered_map<BlockKey, Counts, NameHash> blocks;
    std::unordered_map<BlockKey, Pin, NameHash> pins;  // by their last block
    uint32_t soft = 0, hard = 0;                       // blocks with such a pin
  };

  static void count(OfPool& of, const Pin& pin);
  static void discount(OfPool& of, const Pin& pin);

  std::vector<OfPool> pools_;
};

}  // namespace kvc2
