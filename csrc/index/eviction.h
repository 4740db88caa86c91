// Which page of a pool goes first: the order among nodes whose last page there may be evicted.
//
// The tree says which nodes are evictable and when that changes; the order only ranks them. A
// policy lives wholly in `rank`: now, the dead first (life.h), then pages that a slower pool also
// holds, then by standing, then least recently used. put, drop and first are O(log evictable
// nodes); the tree is never scanned.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <utility>

#include "index/life.h"

namespace kvc2 {

using Rank = uint64_t;  // the lowest is evicted first

constexpr Rank kNotEvictable = ~Rank{0};

inline Rank rank(uint8_t standing, bool held_below, uint32_t stamp) {
  const Rank living = standing != kDead;
  const Rank last_copy = !held_below;
  return living << 63 | last_copy << 62 | Rank{standing} << 32 | stamp;
}

class EvictionOrder {
 public:
  // A node's rank changes; kNotEvictable means that it is not in the order.
  void move(uint32_t node, Rank from, Rank to) {
    if (from != kNotEvictable) order_.erase({from, node});
    if (to != kNotEvictable) order_.insert({to, node});
  }

  std::optional<uint32_t> first() const {
    if (order_.empty()) return std::nullopt;
    return order_.begin()->second;
  }

  bool holds(uint32_t node, Rank rank) const { return order_.contains({rank, node}); }
  size_t size() const { return order_.size(); }

 private:
  std::set<std::pair<Rank, uint32_t>> order_;
};

}  // namespace kvc2
