// Which block gives up its page when a pool needs one, and what is noted when it does.
// In one sentence: *a wanted page is a free one, or the page of the coldest block that may go.*
//
// A block's page in a pool, from -> to [function]:
//   resident  -> free   [allocate, evict]  for room: counted as an eviction
//   resident  -> free   [take]             a fault took it
//   in_flight -> free   [drop]             its transfer failed
//   resident, in_flight -> gone with its pool [forget]
// A pool that may refuse takes a block only if that is worth what it would evict for it, as the
// policy says: the lower standing first, then the page that is worth less (I14). A durable pool
// asks for half as much again: to come there is a write, and a block that has just come to the
// pools above is found there when it comes back soon.
// A block whose last page goes is dead: its obituary tells why. A block that is evicted before the
// next slower pool has it is sent back: the pools above that still have it demote it again.
//
// Costs: O(log nodes) a victim, and the holes that `trim` finds behind it. Not thread-safe: the
// index holds its lock. Knows no lease and no transfer: they are pins to it. What goes first among
// the blocks that may go is the policy's (eviction/policy.h); what may go is the tree's.
#pragma once

#include <optional>
#include <vector>

#include "index/obituaries.h"
#include "index/radix_tree.h"

namespace kvc2 {

struct Evicted {
  std::vector<PageId> pages;
  std::vector<Digest> digests;  // of a durable pool
  uint32_t last_copies = 0;
};

// A block that a pool may refuse, where it has no room but what another block leaves.
struct Newcomer {
  BlockKey key;
  Use use;           // as the tree has it, or as a policy expects it
  uint8_t standing;  // that its page would have there (rank_standing)
  TenantId tenant;
};

struct Given {
  std::optional<PageId> page{};
  std::optional<Worths> refused{};
};

// What a page of a durable pool must be worth, in times of its victim's. On recorded traces this
// brings hits, and spares a small disk a quarter to two thirds of its writes; twice spares more,
// but then up to five conversations more in a hundred miss their first turn.
constexpr float kDurableMargin = 1.5;

class Evictor {
 public:
  Evictor(Pools& pools, RadixTree& tree, EvictionPolicy& policy, uint32_t dead_blocks, bool admits)
      : pools_(pools), tree_(tree), policy_(policy), admits_(admits), obituaries_(dead_blocks) {}

  // A page of the pool, evicting for it unless the pool is durable; none if nothing may go. The
  // page is for the tenant, which has been given `taken` private pages that no quota counts yet.
  std::optional<PageId> allocate(PoolId pool, PageState to, TenantId tenant, uint32_t taken = 0);
  // The same for a block, unless the pool refuses it (I14). A durable pool, which others keep pages
  // free in ahead, counts as full while no more than `ahead` are free.
  Given offer(PoolId pool, PageState to, const Newcomer& block, uint32_t taken = 0,
              uint32_t ahead = 0);
  // What the policy says of both; none where the pools refuse nothing, or it can't tell.
  std::optional<Worths> worths(const Newcomer& block, Place victim) const;
  bool could_evict_only(Place block, PoolId pool, TenantId tenant);  // and nothing else
  // The pool has refused this block, or one above it.
  void note_refusal(PoolId pool, const BlockKey& key, const Worths& worths);
  Worths worths_of(const BlockKey& key) const;  // of its refusal; 0 where that is forgotten
  // The block that `allocate` would evict.
  std::optional<Place> victim_for(PoolId pool, TenantId tenant, uint32_t taken = 0);
  // The coldest block of a tenant that is over its quota in the pool's tier (I11).
  std::optional<Place> victim_over_quota(PoolId pool);

  void evict(Place at, PoolId pool, Evicted& evicted);
  void take(Place at, PoolId pool, Evicted& taken, Cause cause);
  void drop(Place at, PoolId pool, Cause cause);
  void forget(Place at, PoolId pool, Cause cause);  // the page itself is freed with its pool

  // The policy hears of a pool's size when it has grown by a quarter or shrunk to half.
  void tell_size(PoolId pool);
  const Obituaries& obituaries() const { return obituaries_; }

 private:
  PageId clear(Place at, PoolId pool, Cause cause);
  void bury(Place at, PoolId last, Cause cause);
  void count_eviction(Place at, PoolId pool);
  std::optional<Worths> refuses(PoolId pool, const Newcomer& block, Place victim) const;

  Pools& pools_;
  RadixTree& tree_;
  EvictionPolicy& policy_;
  const bool admits_;  // false: whatever a block is worth, it is stored
  Obituaries obituaries_;
  std::vector<uint32_t> told_pages_;  // by pool: its size, as the policy was told
};

// Why a block that is dead matches no more: its namespace is retired, or it has expired.
Cause cause_of_end(const RadixTree& tree, Place dead);

}  // namespace kvc2
