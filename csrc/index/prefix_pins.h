// Prefixes that somebody asked a pool to keep: soft (their blocks are evicted last) or hard (their
// blocks are never evicted; the pool has a limit). A pin names blocks, not pages: a block that is
// not there yet, or that a fault took, is pinned when it comes.
//
//     pin A = [b0 b1], hard     pin B = [b0 b1 b2], soft
//     b0, b1: one hard, one soft     b2: one soft     -> without A, B's blocks stay soft
//
// A pin is known by its pool and its last block: pinning a prefix again replaces its pin, unless
// the new one is to keep a stronger. One with an end is over from that second on. Costs: about 70
// bytes a block of a pin; `of` hashes once, or not at all where a pool has no pins. Not
// thread-safe: the index holds its lock.
#pragma once

#include <cstdint>
#include <set>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "index/block_key.h"
#include "index/page_pool.h"

namespace kvc2 {

enum class Pinned : uint8_t { kNot, kSoft, kHard };

// How a prefix is to be kept. max_blocks: of its pool, that may be pinned in this way. ttl: how
// many seconds; 0: until unpin. keep_stronger: a pin of the prefix that is hard where this one is
// soft, or as hard and ends as late or later, stays in the place of this one.
struct Keeping {
  bool hard = false;
  uint32_t max_blocks = ~uint32_t{0};
  uint32_t ttl = 0;
  bool keep_stronger = false;
};

class PrefixPins {
 public:
  // `keys`, at least one, name the blocks of the prefix. False, and nothing changes, if more than
  // `most` blocks of the pool would be pinned in this way. ends: a second, 0 for none.
  bool pin(PoolId pool, uint32_t space, std::vector<BlockKey>&& keys, Pinned how, uint32_t most,
           uint32_t ends = 0);
  uint32_t unpin(PoolId pool, const BlockKey& last);  // the blocks of that pin; 0: there is none
  std::vector<BlockKey> advance(uint32_t now);        // blocks of the pins that are over
  // Whether this very prefix has a pin that is harder, or as hard and ends as late or later.
  bool stronger(PoolId pool, const BlockKey& last, Pinned how, uint32_t ends) const;
  void forget_pool(PoolId pool);
  void forget_space(uint32_t space);
  bool of_space(uint32_t space) const;  // whether a pin is on a prefix of this namespace

  Pinned of(PoolId pool, const BlockKey& block) const {
    if (pool >= pools_.size() || pools_[pool].blocks.empty()) return Pinned::kNot;
    const auto found = pools_[pool].blocks.find(block);
    if (found == pools_[pool].blocks.end()) return Pinned::kNot;
    return found->second.hard > 0 ? Pinned::kHard : Pinned::kSoft;
  }
  uint32_t blocks(PoolId pool, Pinned how) const;                  // distinct ones
  uint32_t blocks(PoolId pool, Pinned how, uint32_t space) const;  // of this namespace
  size_t metadata_bytes() const;
  void check() const;

 private:
  struct Counts {
    uint32_t soft = 0, hard = 0;  // pins
  };
  struct Pin {
    uint32_t space;
    Pinned how;
    uint32_t ends;  // 0: not by itself
    std::vector<BlockKey> keys;
  };
  struct OfPool {
    std::unordered_map<BlockKey, Counts, NameHash> blocks;
    std::unordered_map<BlockKey, Pin, NameHash> pins;  // by their last block
    uint32_t soft = 0, hard = 0;                       // blocks with such a pin
    std::unordered_map<uint32_t, Counts> spaces;       // those of each namespace
  };

  static void count(OfPool& of, const Pin& pin);
  static void discount(OfPool& of, const Pin& pin);

  std::vector<OfPool> pools_;
  std::set<std::tuple<uint32_t, PoolId, BlockKey>> ends_;  // of the pins that have one
};

}  // namespace kvc2
