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
// A page has one owner and these arrows only (page_pool.h has the functions):
//     free -> private      grant, keep            private -> resident   commit: adopted; restore
//     free -> private      plan_move              private -> resident   complete, of a move
//     free -> in_flight    promote, next_load,    private -> free       give_back, session end,
//                          prefetch, plan_demote                        release of a duplicate
//     resident -> free     complete, of a move: its block has another page of the pool now
//     in_flight -> resident  complete             resident -> free      evict, keep_free, lost,
//                                                                       remove_pool
//     in_flight -> free      complete (the part that failed; to be demoted again if it was)
//
// Laws; `check()` proves them:
//   I1 Children of a node start with distinct keys; no node is empty; keys on a path form the
//   chain. I2 A block has a page, or is a hole above one that has. Policy never makes a hole,
//   faults may
//      (lost, remove_pool, a failed transfer); match stops there; committing that block again joins
//      what is below.
//   I3 A copy that is not the last may be dropped at any time, the leaf of its pool first; a last
//      copy only if it is a leaf of the union of all pools. Blocks of a transfer become resident in
//      prefix order; of a failed one the part before the failure stays; demotion goes parent first.
//   I4 A pin is on (block, pool): a lease pins its own pool's pages, a transfer its source and its
//      destination. Nothing pinned is evicted.
//   I5 Per pool: free + private + resident + in_flight == slabs x pages of a slab.
//   I6 A page has exactly one owner, and a block at most one page in a pool.
//   I7 A page is readable only after commit or completion; committed blocks never change.
//   I8 What is dead (it has expired, or its namespace is retired) matches nobody, is demoted and
//      loaded by nobody, and is the first to be evicted. Pins keep its pages until they end (I4). A
//      retired namespace takes no commits; an expired block that is committed again lives on.
//   I9 A block expires no earlier than what lies below it (life.h).
//   I10 What is pinned hard is not evicted from that pool unless it is dead; what is pinned soft
//   goes when nothing else in the pool may (prefix_pins.h).
//   I11 A tenant that takes more of a tier than its quota gives up its own blocks, and while it
//   does nobody else's are evicted for want of a page (quotas.h).
//
// Presence (resident or in flight) counts for leaf-ness and for "is it there already"; only
// residence counts for a match, as a source, and as a reason to drop another copy.
//
// What a pool evicts before the one below it has it (or has refused it) is demoted again from the
// pools above that still have it, after all that is new, and only where that evicts nothing that
// waits to go down itself: a slow pool keeps nothing new out of the one above it, and no two blocks
// put each other out for ever.
//
// Costs, n blocks of a request, e edges on its path: match and acquire compare n blocks' tokens and
// hash e + 1 blocks; commit, promote and load are O(1) a block, and O(log nodes) a victim. A split
// touches the pages before the branch. stamps, counts, restore, remove_pool and retire walk what
// they name.
// One lock, taken by turns (base/turn_lock.h). A call holds it for about half a millisecond at
// most: what may take longer (evict, reap, grant, lost, keep_free, stamps, counts, close_pool,
// remove_pool, a long commit) gives it back between slices, with every law true; a transfer has at
// most 256 pages. The exceptions grow with what they name: acquire, match and promote of a prompt
// (0.1 us a block), restore, close_slab, retire, check, and the halving of all stamps once in 2^31
// acquires. No call waits for anything else. No I/O, no clock, no threads.
#pragma once

#include <deque>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <unordered_map>
#include <variant>
#include <vector>

#include "base/turn_lock.h"
#include "index/explanation.h"
#include "index/key_table.h"
#include "index/obituaries.h"
#include "index/radix_tree.h"
#include "index/reuse_curve.h"

namespace kvc2 {

using LeaseId = uint64_t;
using TransferId = uint64_t;

// A pool, namespace, lease or transfer that is not (or no longer) there.
struct UnknownId : std::out_of_range {
  using std::out_of_range::out_of_range;
};

enum class CommitResult : uint8_t { kAdopted, kDuplicate, kRefused };
enum class RestoreResult : uint8_t { kRestored, kOrphan, kForged, kConflict };

struct IndexCounts {
  uint64_t namespaces, nodes, blocks, holes, leases, transfers, metadata_bytes, collisions;
  uint64_t deaths, dead_known, dead_bytes;
};

struct Match {
  uint32_t blocks = 0;
  std::vector<uint32_t> tiers;  // by pool of the chain: blocks whose fastest page is there
};

struct Records {  // what a header and the catalogue write of a block; by block
  std::vector<Digest> namespaces, digests, parents;
  std::vector<BlockKey> keys;
  std::vector<uint32_t> tokens;
  std::vector<uint64_t> generations;
};

struct Residents {  // of a durable pool, in page order
  std::vector<PageId> pages;
  Records records;
};

struct Extent {
  uint32_t source, target, pages;
};

struct Transfer {
  TransferId id;
  PoolId source, target;
  std::vector<PageId> source_pages, target_pages;
  std::vector<Extent> extents;
  std::optional<Records> records;  // where one end is durable
};

struct Wait {
  TransferId transfer;
};

using Load = std::variant<std::monostate, Transfer, Wait>;

struct Evicted {
  std::vector<PageId> pages;
  std::vector<Digest> digests;  // of a durable pool
  uint32_t last_copies = 0;
};

struct LeaseView {
  LeaseId id;
  uint32_t matched;
  std::vector<PageId> pages;
  std::vector<uint32_t> tiers;
  TransferId transfer;
  uint32_t computing;
  std::vector<TierRun> ahead;  // matched blocks after `pages`, by the tier they were found in
  Explanation explanation{};   // as acquire found it; empty later
};

struct RestoreBatch {  // by block; tokens are page_size each
  std::span<const Digest> digests, parents;
  Tokens tokens;
  std::span<const PageId> pages;
  std::span<const uint64_t> generations;
  std::span<const uint32_t> stamps;
  std::span<const uint32_t> expires{};  // seconds as of `advance`, 0: never; empty: all never
};

// The contract of each function is in kvc2/_core.pyi. Throws UnknownId, or std::invalid_argument
// for misuse that an argument shows.
class Index {
 public:
  Index(uint64_t first_generation, uint32_t first_stamp, std::string_view policy = "lru",
        uint64_t seed = 0, uint32_t dead_blocks = 1 << 16)
      : policy_(make_policy(policy, seed)),
        tree_(pools_, *policy_),
        obituaries_(dead_blocks),
        generation_(first_generation),
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

  uint32_t open_namespace(const Digest& name, uint32_t page_size);
  bool close_namespace(uint32_t space);
  bool has_pins(uint32_t space) const;
  void set_quota(TenantId tenant, uint8_t tier, uint64_t max_bytes, uint64_t max_blocks);
  void set_tenant(uint32_t space, TenantId tenant);
  Evicted trim(PoolId pool);
  Quota quota(TenantId tenant, uint8_t tier) const;
  uint32_t retire(uint32_t space);
  uint32_t advance(uint32_t now);
  Evicted reap(PoolId pool, uint32_t pages);
  bool pin(uint32_t space, PoolId pool, Tokens tokens, bool hard, uint32_t max_blocks);
  uint32_t unpin(uint32_t space, PoolId pool, Tokens tokens);
  uint32_t pinned_blocks(PoolId pool, bool hard) const;

  Match match(uint32_t space, PoolId pool, Tokens tokens) const;
  Explanation explain(uint32_t space, std::span<const PoolId> pools, Tokens tokens) const;
  LeaseView acquire(uint32_t space, PoolId pool, Tokens tokens, uint32_t max_blocks,
                    const Hints& hints = {});
  Load next_load(LeaseId lease, uint32_t max_pages);
  Load prefetch(uint32_t space, PoolId pool, Tokens tokens, uint32_t max_pages, bool touches);
  std::optional<Transfer> promote(LeaseId lease);
  LeaseView lease(LeaseId lease) const;
  void shorten(LeaseId lease, uint32_t blocks);
  std::vector<CommitResult> commit(LeaseId lease, uint32_t first_block, Tokens tokens,
                                   std::span<const PageId> pages);
  void release(LeaseId lease, const Hints& hints = {});

  std::vector<PageId> grant(PoolId pool, uint32_t pages, std::optional<uint32_t> space = {});
  bool keep(PoolId pool, std::span<const PageId> pages);
  bool give_back(PoolId pool, std::span<const PageId> pages);

  std::optional<Transfer> plan_demote(PoolId pool, uint32_t max_pages);
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

  IndexCounts counts() const;
  // What LRU caches of so many tokens would have hit, of all tokens asked for; see reuse_curve.h.
  std::vector<double> hit_rates(std::span<const uint64_t> capacities);
  void check() const;

 private:
  using Lock = std::lock_guard<TurnLock>;
  static constexpr uint8_t kComputed = 0xFF;
  // What is done before the lock changes hands: each about a fifth of a millisecond's work.
  static constexpr uint32_t kSlicePages = 256, kSliceCommits = 2048, kTransferPages = 256;
  static constexpr uint32_t kNoneFresh = 0xFFFFFFFF;

  // One block of a lease. `page` is what the engine uses, `anchor` the block's page in the pool,
  // pinned: the same, unless `page` is a duplicate's. The anchor's owner is how the lease finds its
  // block again after splits.
  struct Held {
    PageId page, anchor;
    uint8_t tier;  // found in this pool of the chain at acquire; kComputed when committed
  };

  struct Lease {
    uint32_t space;
    PoolId pool;
    uint32_t stamp;
    Hints hints{};
    uint32_t matched = 0;
    uint32_t computing = 0;
    std::vector<Held> held{};           // of leading blocks
    std::vector<Held> stray{};          // after a transfer failed: pinned till release, unusable
    std::vector<uint8_t> found{};       // by matched block: the fastest tier at acquire
    uint32_t tokens_from = 0;           // first block that `tokens` has
    std::vector<uint32_t> tokens{};     // of matched blocks that were not in the pool at acquire
    std::vector<TransferId> depends{};  // transfers that fill held pages
    std::vector<BlockKey> unmatched{};  // keys of the full blocks after `matched`
    uint32_t computing_from = 0;        // of them, from here on registered in computing_
  };

  struct OpenTransfer {
    PoolId source,
        target;  // the same: a move, whose target pages no block has before it is complete
    std::vector<PageId> source_pages{}, target_pages{};
    bool failed = false;  // an end was removed; the other stays pinned until complete

    bool is_move() const { return source == target; }
  };

  // Calls `step` until it says that there is no more, in slices between which the lock changes
  // hands. Throws UnknownId once the pool is removed.
  template <typename Step>
  void in_slices(PoolId id, Step&& step) const {
    for (bool more = true; more;) {
      const Lock lock(mutex_);
      pool(id);
      for (uint32_t i = 0; more && i < kSlicePages; ++i) more = step();
    }
  }

  // The leading blocks of some tokens that are resident in some pools.
  struct Found {
    uint32_t space;
    std::vector<Run> path{};
    std::vector<uint8_t> tiers{};   // by block: position among the pools of the fastest that has it
    Place last;                     // the last of these blocks, or where the path begins
    std::optional<Place> passed{};  // the next block, if it is in the tree all the same
  };

  // pools.cpp
  PagePool& pool(PoolId id) const;
  void tell_size(PoolId id);
  bool alive(PoolId id) const { return id < pools_.size() && pools_[id] && !pools_[id]->leaving; }
  std::vector<PoolId> chain(PoolId head) const;
  // Evicts, but never in a durable pool; for a tenant that has taken `taken` private pages.
  std::optional<PageId> allocate(PoolId pool, PageState to, TenantId tenant, uint32_t taken = 0);
  std::optional<Place> victim_for(PoolId pool, TenantId tenant, uint32_t taken);
  std::optional<Place> victim_of_over(PoolId pool);
  PageId clear(Place at, PoolId pool, Cause cause);  // its page, which is still to be freed
  void drop(Place at, PoolId pool, Cause cause);
  void count_eviction(Place at, PoolId pool);
  void evict_at(Place at, PoolId pool, Evicted& evicted);
  void take_away(Place at, PoolId pool, Evicted& taken, Cause cause);
  const PagePool& start_leaving(PoolId pool);

  // explain.cpp
  void bury(Place at, PoolId last, Cause cause);
  Cause cause_of_end(Place dead) const;
  std::optional<Sibling> sibling_of(Place last, Tokens block, uint32_t most) const;
  Miss why_absent(Place last, const BlockKey& key, Tokens block, uint32_t siblings) const;
  Obituary ended(Place at) const;
  Miss why_passed(Place at) const;
  Explanation explanation(const Found& found, Tokens tokens, uint32_t siblings) const;

  // lives.cpp
  std::vector<BlockKey> pin_keys(uint32_t space, PoolId pool, Tokens tokens) const;
  void refresh_path(uint32_t space, Tokens tokens);

  // leases.cpp
  const Lease& open_lease(LeaseId id) const;
  const Space& open_space(uint32_t space) const;
  void check_space(uint32_t space, PoolId pool) const;
  Found find(uint32_t space, std::span<const PoolId> pools, const std::vector<Run>& path) const;
  uint32_t tiers_of(const Run& run, std::span<const PoolId> chain,
                    std::vector<uint8_t>& tiers) const;
  uint32_t tick();
  void hold_leading(Lease& lease, const std::vector<Run>& path);
  uint32_t hold(Lease& lease, const Run& run);
  void catch_up();
  void learn(const Lease& lease, const std::vector<Run>& path, size_t blocks, uint64_t tokens);
  std::vector<BlockKey> keys_after(const Lease& lease, Tokens tokens,
                                   const std::vector<Run>& path) const;
  void register_computing(Lease& lease, std::vector<BlockKey>&& keys);
  void unregister_computing(Lease& lease, uint32_t end);
  void requeue(const Run& run, std::span<const PoolId> chain);
  LeaseView view(LeaseId id, const Lease& lease) const;
  Place cursor(const Lease& lease) const;
  std::optional<Place> step(const Lease& lease, Place at, uint32_t block) const;
  void commit_slice(Lease& lease, uint64_t first_block, Tokens tokens,
                    std::span<const PageId> pages, std::span<CommitResult> results);
  CommitResult commit_again(const Lease& lease, uint32_t block, Tokens tokens, PageId page) const;
  CommitResult commit_next(Lease& lease, Place& at, Tokens tokens, PageId page);
  uint32_t commit_rest(Lease& lease, NodeId node, Tokens tokens, std::span<const PageId> pages);
  void let_go(PoolId pool, std::span<const Held> held);
  void close_lease(Lease& lease);

  // transfers.cpp
  bool add(OpenTransfer& plan, Place at, bool sent_back = false);
  bool may_return(Place at, PoolId target);
  Transfer start(OpenTransfer&& plan);
  Records records_of(const OpenTransfer& plan);
  bool admitted(Place at, PoolId target) const;
  bool is_above(PoolId above, PoolId pool) const;
  bool refused_by(PoolId pool, PoolId above, PageId page) const;
  void add_record(Records& records, Place at, uint64_t generation);
  std::vector<Place> missing_below(PoolId source, PoolId target, PageId page) const;
  std::vector<PageId> complete_move(const OpenTransfer& move, uint32_t done);
  void arrive(PoolId target, PageId page);
  void fail(PoolId target, std::span<const PageId> pages);
  std::optional<TransferId> transfer_into(PoolId pool, PageId page) const;

  // restore.cpp
  struct Known {  // what a record can hang on: a resident page, or (kNoPage) a namespace's root
    Digest digest;
    PageId page;
    NodeId root;
  };
  std::deque<Known> known_parents(PoolId pool);
  RestoreResult restore_one(PoolId pool, const RestoreBatch& batch, size_t i, Place parent);

  // check.cpp
  void check_pins() const;
  void check_computing() const;

  mutable TurnLock mutex_;
  Pools pools_;
  std::unique_ptr<EvictionPolicy> policy_;
  RadixTree tree_;
  std::vector<uint32_t> told_pages_;  // by pool: its size, as the policy was told
  std::unordered_map<BlockKey, uint32_t, NameHash> space_ids_;  // by root key
  std::unordered_map<LeaseId, Lease> leases_;
  std::unordered_map<TransferId, OpenTransfer> transfers_;
  std::unordered_map<uint64_t, TransferId> in_flight_;  // by pool << 32 | target page
  KeyTable computing_;                                  // how many leases compute a block
  Obituaries obituaries_;
  uint64_t generation_;  // of the next page reused
  uint32_t stamp_;       // of the last acquire
  LeaseId last_lease_ = 0;
  TransferId last_transfer_ = 0;
  uint64_t collisions_ = 0;
  ReuseCurve curve_;
};

}  // namespace kvc2
