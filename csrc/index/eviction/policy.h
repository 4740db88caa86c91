// Which page of a pool goes first. The tree says which nodes are evictable and when that changes;
// a policy ranks them, and knows no tree, lease or transfer.
//
//     tree -- added, touched, placed, cleared --> policy   (a Use per block, counts, ghosts)
//     tree -- rank of a Use --> EvictionOrder              (one a pool: the evictable nodes)
//     tree <-- choose: the next victim -- policy
//
// A policy orders only nodes of one standing (see Rank): copies that a slower pool also holds
// always go before last copies. A policy is deterministic under its seed, keeps at most 13 bytes a
// page of a pool about evicted blocks, and takes O(log evictable nodes) a victim.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "index/block_key.h"
#include "index/life.h"
#include "index/page_pool.h"

namespace kvc2 {

// What a policy knows of a block, kept in the tree beside it.
struct Use {
  uint32_t stamp = 0;  // the acquire that last used it
  uint32_t mark = 0;   // the policy's own
};

// The lowest is evicted first: the standing (8 bits), the policy's queue (24), the stamp (32).
using Rank = uint64_t;

constexpr Rank kNotEvictable = ~Rank{0};

// The order under every policy: first the dead; then copies that a slower pool also holds; in each
// of these, the lower standing of life.h goes first.
constexpr uint8_t rank_standing(uint8_t standing, bool held_below) {
  const bool living = standing != kDead;
  const bool last_copy = !held_below;
  return static_cast<uint8_t>(living << 7 | last_copy << 6 | standing);
}

// Of the refused blocks that a policy watches, by tier: how many there were, and how many of them
// were asked for again before they were forgotten, and missed.
struct Regret {
  uint64_t watched = 0, regretted = 0;
};

constexpr uint8_t kNeverRefused = 0xFF;  // the standing of a newcomer that nothing outranks

struct Queued {  // what a policy makes of a Use
  uint32_t queue = 0;
  uint32_t stamp = 0;
};

constexpr Rank rank_in(uint8_t standing, Queued at) {
  return Rank{standing} << 56 | Rank{at.queue} << 32 | at.stamp;
}

// The evictable nodes of one pool by rank. Each call is O(log nodes).
class EvictionOrder {
 public:
  struct Entry {
    Rank rank;
    NodeId node;

    auto operator<=>(const Entry&) const = default;
    uint32_t queue() const { return rank >> 32 & 0xFFFFFF; }
    uint32_t stamp() const { return static_cast<uint32_t>(rank); }
  };

  // A node's rank changes; kNotEvictable means that it is not in the order.
  void move(NodeId node, Rank from, Rank to) {
    if (from != kNotEvictable) order_.erase({from, node});
    if (to != kNotEvictable) order_.insert({to, node});
  }

  std::optional<Entry> first() const;  // of all
  // The oldest of a queue since `stamp`, in the lowest standing that there is.
  std::optional<Entry> oldest(uint32_t queue, uint32_t stamp = 0) const;
  bool holds(Entry entry) const { return order_.contains(entry); }
  size_t size() const { return order_.size(); }

 private:
  std::set<Entry> order_;
};

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // A request added a block to the tree below `parent` (null: it is the first of its path), or a
  // restart found it on disk.
  virtual Use added(const BlockKey& key, const Use* parent, uint32_t stamp) = 0;
  virtual Use restored(uint32_t stamp) const { return {stamp}; }
  // A request used a block that the tree has.
  virtual void touched(const BlockKey& key, Use& use, uint32_t stamp) = 0;

  // Admission: which blocks are worth a page. A request asked for these blocks below `parent`, and
  // found none of them. The policy learns of it, whether they are stored or not, and says the mark
  // that each would have; one that judges no block says nothing.
  virtual std::vector<uint32_t> asked(std::span<const BlockKey>, const Use* /*parent*/,
                                      uint32_t /*stamp*/) {
    return {};
  }
  // A block that was just added is one that was asked for, and was given this mark.
  virtual void expected(Use&, uint32_t /*mark*/) {}
  // What a page is worth that has such a block, in the policy's own unit; none: it can't tell.
  virtual std::optional<float> worth(const Use&) { return std::nullopt; }
  virtual void refused(uint8_t /*tier*/, const BlockKey&) {}
  virtual Regret regret(uint8_t /*tier*/) const { return {}; }

  // By pool: pages come and go, and change their queue with their block's mark.
  virtual bool counts_pages() const { return false; }  // whether it wants to be told
  virtual void placed(PoolId, const BlockKey&, Use&) {}
  virtual void cleared(PoolId, const BlockKey&, const Use&) {}
  virtual void marked(PoolId, const Use& /*from*/, const Use& /*to*/) {}
  // Pages of a pool in a queue, as it was told: what the tree's check compares.
  virtual uint32_t held(PoolId, uint32_t /*queue*/) const { return 0; }

  virtual Queued queued(const Use& use) const { return {0, use.stamp}; }
  // The next victim among the lowest standing of a pool; none if the order is empty.
  virtual std::optional<EvictionOrder::Entry> choose(PoolId, const EvictionOrder& order) {
    return order.first();
  }
  // How many queues it ranks in: the oldest leaf of all is the oldest of one of them.
  virtual uint32_t queues() const { return 1; }
  // True if the victim gets another chance; its mark says so from then on.
  virtual bool spares(PoolId, Use&) { return false; }

  // The pool has grown by a quarter or shrunk to half. The policy may forget its ghosts.
  virtual void resize(PoolId, uint32_t /*pages*/) {}
  virtual void halve(Use& use) const { use.stamp /= 2; }  // of every block, then:
  virtual void halved() {}                                // the clock
  virtual size_t metadata_bytes() const { return 0; }
};

// "lru", "arc", "s3fifo" or "hazard"; for tests "by_key". Throws std::invalid_argument.
std::unique_ptr<EvictionPolicy> make_policy(std::string_view name, uint64_t seed);

}  // namespace kvc2
