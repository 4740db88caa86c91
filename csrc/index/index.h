// The index: what is cached, where, who may use it, and what should move. It decides; the daemon
// executes. In one sentence: *a radix tree of blocks, each with at most one page in each pool,
// where leases and transfers pin pages and everything unpinned may be evicted from its leaves.*
//
//     namespace ── [b0 b1 b2] ─┬─ [b3 b4]                      a node: a run of blocks
//                              └─ [b3' b4' b5']
//     gpu 4 (engine A)  5  6  7     8  9                       a page per block and pool:
//     gpu 6 (engine B)  1  2        -                          pools may hold different prefixes
//     cpu 1             3  4  5     6  -                       of a path
//     disk 0            9  8  7     6  -
//         below: gpu 4 -> cpu 1, gpu 6 -> cpu 1, cpu 1 -> disk 0    (a chain, fastest first)
//
// A page has one owner. These are all the changes of owner, from -> to [call] (see page_pool.h):
//   free      -> private    [grant, keep; plan_move]
//   free      -> in_flight  [promote, next_load, prefetch, plan_demote]
//   free      -> resident   [restore]
//   private   -> resident   [commit: adopted; complete, of a move]
//   private   -> free       [give_back; close_pool; release, of a duplicate; complete, of a move
//                            whose block stays]
//   in_flight -> resident   [complete]
//   in_flight -> free       [complete, of what has not come: a demotion is queued again]
//   resident  -> free       [evict, keep_free, trim, reap, and every call that needs a page; lost;
//                            remove_pool; complete, of a move: the block has another page now]
//
// Laws; `check()` proves them, with L1-L4 of leases.h and T1-T3 of transfers.h:
//   I1 The children of a node begin with distinct keys. Only a root is empty. The keys on a path
//      form the chain of block_key.h.
//   I2 A block has a page in some pool, or is a hole: a block without a page that lies above one
//      with a page. Eviction never makes a hole; a fault may (lost, remove_pool, a failed
//      transfer). A match stops at a hole. Committing the block again fills the hole.
//   I3 A pool may give up a copy that is not the block's last at any time, the leaves of the pool
//      first. It may give up a last copy only if the block is a leaf in the union of all pools.
//   I4 A pin is on a page: an open lease pins pages of its own pool, an open transfer those of its
//      source and its target. A pinned page is not evicted.
//   I5 Per pool: free + private + resident + in_flight + gone == slabs x pages of a slab, where a
//      page is gone that was freed in a closed slab.
//   I6 A page has exactly one owner, and a block has at most one page in a pool.
//   I7 A page is readable only after its commit or the completion of its transfer: a page that is
//      still being filled is private or in flight. A block's names and tokens never change.
//   I8 A dead block (it has expired, or its namespace is retired) matches no request, is neither
//      demoted nor loaded, and is evicted first. Pins keep its pages until they end (I4). A retired
//      namespace takes no commits; an expired block that is committed again lives on.
//   I9 A block expires no earlier than the blocks below it (life.h).
//   I10 A pool does not evict a block that is pinned hard in it, unless the block is dead. A block
//      that is pinned soft in it is evicted only when no other block may go (prefix_pins.h).
//   I11 While a tenant takes more of a tier than its quota, only blocks of that tenant are evicted
//      for want of a page there, as long as one of them may go (quotas.h).
//   I12 A block waits at most once in each of a pool's two queues of blocks to demote. A pool with
//      second_access takes only reused blocks, and the reused blocks of a path are leading ones.
//   I13 Blocks of equal tokens and other extras are other blocks, and so is all below them. A block
//      with extras is the first of its node.
//   I14 Where a pool has no room but what another block would leave, it refuses a block that is
//      worth less than that one, and all that hangs on it: of what is copied down, prefetched, or
//      granted to a lease for blocks of its own. A refused block is refused, without being judged
//      anew, until it is used again; then, and where somebody insists, it is queued as before. It
//      counts as spare where it is. No pool refuses what somebody insists on, what is pinned hard
//      there, or what an engine computes into its own pool or waits for. A durable pool refuses
//      what is not worth half as much again; and what is copied down is refused where nothing but
//      the block that it hangs on could go, now or later.
//
// A block is present in a pool while its page there is resident or in flight. Whether a block is a
// leaf, and whether a pool has it already, is a question of presence. What matches, what can be the
// source of a transfer, and what makes another copy spare, must be resident.
//
// A block evicted before the next tier has it is demoted again from a faster tier, after new
// blocks, and only where that evicts no block awaiting demotion. So a slow tier keeps no new block
// out of the tier above it, and no two blocks evict each other for ever.
//
// A namespace's blocks are named by tokens, or each by a key of its engine's own (opaque). Such a
// block is the only one of its path, so that nothing of the above differs.
//
// What is where: Pools has the pages and RadixTree the blocks, Evictor makes room. Transfers,
// Leases and KeyLeases have what is open. The index owns these, and holds the one lock for all.
//
// Costs, n blocks of a request, e edges on its path: match and acquire compare n blocks' tokens and
// hash e + 1 blocks; commit, promote and load are O(1) a block, and O(log nodes) a victim. A split
// touches the pages before the branch. stamps, counts, restore, remove_pool and retire walk what
// they name.
// The lock is taken by turns (base/turn_lock.h). A call holds it for about half a millisecond at
// most: a call that may take longer (evict, reap, grant, lost, keep_free, stamps, counts,
// close_pool, remove_pool, a long commit) gives it back between slices, with every law true; a
// transfer has at most 256 pages. The exceptions grow with what they name: acquire, match and
// promote of a prompt (0.1 us a block), restore, close_slab, retire, check, and the halving of all
// stamps once in 2^31 acquires. No call waits for anything else. No I/O, no clock, no threads.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/turn_lock.h"
#include "index/evictor.h"
#include "index/explain.h"
#include "index/key_leases.h"
#include "index/leases.h"
#include "index/reuse_curve.h"
#include "index/transfers.h"

namespace kvc2 {

enum class RestoreResult : uint8_t { kRestored, kOrphan, kForged, kConflict };

struct IndexCounts {
  uint64_t namespaces, nodes, blocks, holes, leases, transfers, metadata_bytes, collisions;
  uint64_t deaths, dead_known, dead_bytes;
};

struct RestoreBatch {  // by block; tokens are page_size each
  std::span<const Digest> digests, parents;
  Tokens tokens;
  std::span<const PageId> pages;
  std::span<const uint64_t> generations;
  std::span<const uint32_t> stamps;
  std::span<const uint32_t> expires{};        // seconds as of `advance`, 0: never; empty: all never
  std::span<const uint8_t> external_bytes{};  // of the key in the place of tokens; empty: all 0
  std::span<const ExternalKey> external_keys{};
  std::span<const Digest> extras{};  // zeros: none; empty: none has any
};

// The contract of each function is in kvc2/_core.pyi. Throws UnknownId, or std::invalid_argument
// for misuse that an argument shows.
class Index {
 public:
  // What is done before the lock changes hands: each about a fifth of a millisecond's work.
  static constexpr uint32_t kSlicePages = 256, kSliceCommits = 2048;

  Index(uint64_t first_generation, uint32_t first_stamp, std::string_view policy = "lru",
        uint64_t seed = 0, uint32_t dead_blocks = 1 << 16, bool admission = false,
        size_t kv_event_bytes = 0)
      : policy_(make_policy(policy, seed)),
        tree_(pools_, *policy_, kv_event_bytes),
        evictor_(pools_, tree_, *policy_, dead_blocks, admission),
        transfers_(pools_, tree_, evictor_, first_generation),
        leases_(pools_, tree_, transfers_, curve_),
        key_leases_(pools_, tree_, transfers_),
        stamp_(first_stamp) {}

  PoolId add_pool(const PagePool::Shape& shape);
  uint32_t add_slab(PoolId pool);
  bool take_slab(PoolId pool, uint32_t slab);
  bool close_slab(PoolId pool, uint32_t slab);
  bool reopen_slab(PoolId pool, uint32_t slab);
  std::vector<uint32_t> slab_pages(PoolId pool) const;
  PagePool::Counts pool_counts(PoolId pool) const;
  std::optional<uint32_t> victim_age(PoolId pool) const;
  uint32_t page_size(PoolId pool) const;
  void close_pool(PoolId pool);
  void remove_pool(PoolId pool);

  uint32_t open_namespace(const Digest& name, uint32_t page_size, bool opaque = false);
  bool close_namespace(uint32_t space);
  bool has_pins(uint32_t space) const;
  void set_quota(TenantId tenant, uint8_t tier, uint64_t max_bytes, uint64_t max_blocks);
  void set_tenant(uint32_t space, TenantId tenant);
  Evicted trim(PoolId pool);
  Quota quota(TenantId tenant, uint8_t tier) const;
  uint32_t retire(uint32_t space);
  uint32_t advance(uint32_t now);
  Evicted reap(PoolId pool, uint32_t pages);
  bool pin(uint32_t space, PoolId pool, const Content& prefix, const Keeping& as);
  uint32_t unpin(uint32_t space, PoolId pool, const Content& prefix);
  uint32_t pinned_blocks(PoolId pool, bool hard, std::optional<TenantId> of = {}) const;

  Match match(uint32_t space, PoolId pool, const Content& prompt) const;
  Explanation explain(uint32_t space, std::span<const PoolId> pools, const Content& prompt) const;
  LeaseView acquire(uint32_t space, PoolId pool, const Content& prompt, uint32_t max_blocks,
                    const Hints& hints = {}, uint32_t skip_blocks = 0, bool touches = true);
  Load next_load(LeaseId lease, uint32_t max_pages);
  Load prefetch(uint32_t space, PoolId pool, const Content& prefix, uint32_t max_pages,
                bool touches);
  std::optional<Transfer> promote(LeaseId lease, uint32_t max_pages = ~uint32_t{0});
  LeaseView lease(LeaseId lease) const;
  void shorten(LeaseId lease, uint32_t blocks);
  std::vector<CommitResult> commit(LeaseId lease, const Content& blocks,
                                   std::span<const PageId> pages);
  void release(LeaseId lease, const Hints& hints = {});
  uint32_t release_all(std::span<const LeaseId> leases);  // how many of them were open

  // Opaque keys (keys.cpp). next_load, promote, release and held_in are those of both leases.
  std::vector<uint8_t> match_keys(uint32_t space, PoolId pool,
                                  std::span<const KeyBlock> keys) const;
  std::vector<Explanation> explain_keys(uint32_t space, std::span<const PoolId> pools,
                                        std::span<const KeyBlock> keys) const;
  KeyLeaseView acquire_keys(uint32_t space, PoolId pool, std::span<const KeyBlock> keys,
                            const Hints& hints, bool touches = true);
  KeyLeaseView key_lease(LeaseId lease) const;
  std::vector<CommitResult> commit_keys(uint32_t space, PoolId pool, std::span<const KeyBlock> keys,
                                        std::span<const PageId> pages, std::optional<LeaseId> lease,
                                        const Hints& hints);
  Load prefetch_keys(uint32_t space, PoolId pool, std::span<const KeyBlock> keys,
                     uint32_t max_pages, bool touches);
  std::vector<uint8_t> pin_keys(uint32_t space, PoolId pool, std::span<const KeyBlock> keys,
                                const Keeping& as);
  std::vector<uint8_t> unpin_keys(uint32_t space, PoolId pool, std::span<const KeyBlock> keys);

  std::vector<PageId> grant(PoolId pool, uint32_t pages, std::optional<uint32_t> space = {});
  std::vector<PageId> grant_for(LeaseId lease, uint32_t first_block, uint32_t blocks);
  std::vector<PageId> grant_for_keys(LeaseId lease, std::span<const KeyBlock> keys);
  bool keep(PoolId pool, std::span<const PageId> pages);
  bool give_back(PoolId pool, std::span<const PageId> pages);

  std::optional<Transfer> plan_demote(PoolId pool, uint32_t max_pages, uint32_t ahead = 0);
  void insist(LeaseId lease);
  uint64_t insist_all(PoolId pool);
  Regret regret(uint8_t tier) const;
  uint64_t undemoted(PoolId pool) const;
  uint32_t held_in(LeaseId lease, PoolId pool) const;
  uint64_t not_admitted(PoolId pool) const;
  std::optional<Transfer> plan_move(PoolId pool, uint32_t slab, uint32_t max_pages);
  std::vector<PageId> complete(TransferId transfer, uint32_t done);
  Evicted evict(PoolId pool, uint32_t pages);
  Evicted keep_free(PoolId pool, uint32_t pages);
  Evicted lost(PoolId pool, std::span<const PageId> pages);
  std::vector<RestoreResult> restore(PoolId pool, const RestoreBatch& batch);
  std::vector<uint32_t> stamps(PoolId pool) const;
  std::vector<uint32_t> lifetimes(PoolId pool) const;
  void expire_by(uint32_t space, uint32_t second);
  // What is resident in `count` pages from `first` on. Pins nothing: a page that has the same
  // generation before and after its bytes were read had that block all the time.
  Residents residents(PoolId pool, PageId first, uint32_t count);

  // What routers are told (kv_events.h): the oldest changes, and whether there are more by now.
  // Where none wait, a scan goes on over so many pages.
  std::pair<KvEvents, bool> take_kv_events(uint32_t scan_pages = kSlicePages);
  void tell_kv_events_anew();
  uint64_t kv_event_overflows() const;

  IndexCounts counts() const;
  // What LRU caches of so many tokens would have hit, of all tokens asked for; see reuse_curve.h.
  std::vector<double> hit_rates(std::span<const uint64_t> capacities);
  void check() const;

 private:
  using Lock = std::lock_guard<TurnLock>;

  // Calls `step` until it says that there is no more, in slices between which the lock changes
  // hands. Throws UnknownId once the pool is removed.
  template <typename Step>
  void in_slices(PoolId id, Step&& step) const {
    for (bool more = true; more;) {
      const Lock lock(mutex_);
      pools_.at(id);
      for (uint32_t i = 0; more && i < kSlicePages; ++i) more = step();
    }
  }

  // index.cpp
  const PagePool& start_leaving(PoolId pool);
  Given give(PoolId pool, TenantId tenant, const std::optional<Newcomer>& block, uint32_t taken);

  // requests.cpp
  const Space& open_space(uint32_t space) const;
  void check_space(uint32_t space, PoolId pool) const;
  void check_tokens(uint32_t space, PoolId pool) const;
  void check_leasable(PoolId pool) const;
  uint32_t tick();
  void catch_up();

  // keys.cpp
  void check_keys(uint32_t space, PoolId pool) const;

  // lives.cpp
  std::vector<BlockKey> path_keys(uint32_t space, const Content& prefix) const;
  bool pin_path(uint32_t space, PoolId pool, const Content& prefix, const Keeping& as);
  uint32_t unpin_path(uint32_t space, PoolId pool, const Content& prefix);
  void refresh_path(uint32_t space, const Content& prefix);

  // restore.cpp
  struct Known {  // what a record can hang on: a resident page, or (kNoPage) a namespace's root
    Digest digest;
    PageId page;
    NodeId root;
  };
  std::deque<Known> known_parents(PoolId pool);
  bool may_hang(const RestoreBatch& batch, size_t i, Place parent) const;
  RestoreResult restore_one(PoolId pool, const RestoreBatch& batch, size_t i, Place parent);

  // check.cpp
  void check_queues(PoolId pool) const;
  void check_claims() const;

  mutable TurnLock mutex_;
  Pools pools_;
  std::unique_ptr<EvictionPolicy> policy_;
  RadixTree tree_;
  Evictor evictor_;
  Transfers transfers_;
  ReuseCurve curve_;
  Leases leases_;
  KeyLeases key_leases_;
  LeaseId last_lease_ = 0;
  std::unordered_map<BlockKey, uint32_t, NameHash> space_ids_;  // by root key
  uint32_t stamp_;                                              // of the last acquire
};

}  // namespace kvc2
