// What requests use: the open leases, and which blocks each of them computes.
// In one sentence: *a lease pins, in one pool, the pages of the leading blocks of a prompt that are
// there, and says which of the blocks after them it brings nearer and which it computes.*
//
//     prompt      b0 b1 b2 b3 | b4 b5 b6 | b7 b8
//                 held: pinned  matched:   computing:
//                 in the pool   elsewhere  nowhere
//                             ^ cursor
//
// A block of a lease, from -> to [function]:
//   (asked for) -> held        [open]            its page is in the lease's pool, or on its way
//   (asked for) -> matched     [open]            it is in a pool further down the chain
//   (asked for) -> computing   [open]            it is in none
//   matched     -> held        [promote]             it was in the pool below, or has come since
//   matched     -> computing   [shorten]
//   matched, computing -> held [commit]          adopted, or its page is a duplicate
//   held        -> stray       [lose]            at or after a page whose transfer failed
//   held, stray -> (let go)    [release, close]
// A lease, from -> to [function]: absent -> open [open]; open -> absent [release, close].
//
// A lease is on any pool that is not durable: on an engine's, or on the one above the disk, where
// its blocks are read in place. promote brings from the pool below, from a durable one too;
// next_load brings from the durable pool into the one above it, where that is not the lease's own.
// Both may be asked again and again, at once or much later: a lease never holds more of its prompt
// than `open` matched and what it commits.
//
// The caller has the blocks that it skips: they are compared and touched, but not pinned. A page
// that the lease holds keeps them in the tree (I3). While it holds none, they may go; then nothing
// more of it can be brought or committed.
//
// Laws; `check` proves them:
//   L1 What a lease holds are consecutive blocks of one path, without a gap: the leading ones, or
//      those after the blocks that it skips. It skips only blocks that it has matched.
//   L2 A lease that holds a page in flight depends on the transfer that fills the page.
//   L3 A block counts as being computed by just as many leases as have it to compute.
//   L4 A page that a lease on opaque keys holds is that of its key (key_leases.h).
//
// Costs: a lease has 12 bytes a held block, the tokens of other blocks that it has matched, and
// 16 bytes a block to compute; computing_ has about 36 a block. open and release are O(blocks);
// commit is O(1) a block; `lose` walks all leases. Not thread-safe: the index holds its lock. Moves
// no byte, and knows no clock but the stamp that it is given.
#pragma once

#include <optional>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "index/claims.h"
#include "index/explanation.h"
#include "index/key_table.h"
#include "index/match.h"
#include "index/reuse_curve.h"
#include "index/transfers.h"

namespace kvc2 {

using LeaseId = uint64_t;

enum class CommitResult : uint8_t { kAdopted, kDuplicate, kRefused };

struct LeaseView {
  LeaseId id;
  uint32_t matched;
  uint32_t first_block;  // of `pages`
  std::vector<PageId> pages{};
  std::vector<uint32_t> tiers;
  TransferId transfer = 0;
  uint32_t computing;
  uint32_t arrived = 0;          // leading ones of `pages` that are not being filled
  std::vector<TierRun> ahead{};  // matched blocks after `pages`, by the tier they were found in
  Explanation explanation{};     // as acquire found it; empty later
};

class Leases {
 public:
  struct Request {
    std::span<const PoolId> pools;  // the chain of the lease's pool
    Content content;                // of the whole prompt
    size_t blocks;                  // asked for, the leading ones of it
    uint32_t stamp;
    const Hints& hints;
    uint32_t skip;  // leading blocks that the caller has
    bool touches;   // it is a use; else nothing is learnt of it, and it computes nothing
  };

  Leases(Pools& pools, RadixTree& tree, Transfers& transfers, ReuseCurve& curve)
      : pools_(pools), tree_(tree), transfers_(transfers), curve_(curve) {}

  // Each throws UnknownId for a lease that is not open.
  LeaseView open(LeaseId id, const Request& request, Found&& found);
  LeaseView view(LeaseId id) const;
  void shorten(LeaseId id, uint32_t blocks);
  Load next_load(LeaseId id, uint32_t max_pages);
  std::optional<Transfer> promote(LeaseId id, uint32_t max_pages);
  // Fills `results`, one a page, which are kRefused before; `blocks` has as many.
  void commit(LeaseId id, const Content& blocks, std::span<const PageId> pages,
              std::span<CommitResult> results);
  void release(LeaseId id, const Hints& hints);
  uint32_t held_in(LeaseId id, PoolId pool) const;  // of its held blocks, those resident there
  uint32_t page_size(LeaseId id) const;

  // So many of its blocks from `block` on, up to the last that acquire asked for, as ones that its
  // pool may refuse; none for one that acquire matched.
  std::vector<std::optional<Newcomer>> newcomers(LeaseId id, uint32_t block, uint32_t blocks);
  void insist(LeaseId id);  // all that it holds shall come to the last pool of its chain

  struct Where {
    PoolId pool;
    uint32_t space;
  };
  Where where(LeaseId id) const { return {get(id).pool, get(id).space}; }
  std::vector<LeaseId> in_pool(PoolId pool) const;
  bool use_space(uint32_t space) const;  // whether one of them is of this namespace
  bool close(LeaseId id);                // false, and nothing, where the lease is not open any more
  // These pages are about to be free: leases of the pool end before the first of them. What a lease
  // held after it stays pinned until release, since an engine may still be reading it.
  void lose(PoolId pool, std::span<const PageId> pages);
  void halve_stamps();

  size_t size() const { return leases_.size(); }
  void claim(Claims& claims) const;
  void check() const;

 private:
  static constexpr uint8_t kComputed = 0xFF;
  static constexpr uint32_t kEveryBlock = 0xFFFFFFFF;

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
    uint32_t computing = 0;             // blocks after `matched` that another lease computed first
    uint32_t first = 0;                 // block that `held` begins with
    std::vector<uint32_t> skipped{};    // tokens of the blocks before it
    std::vector<Held> held{};           // of consecutive blocks
    std::vector<Held> stray{};          // after a transfer failed: pinned till release, unusable
    std::vector<uint8_t> found{};       // by matched block: the fastest tier at acquire
    uint32_t tokens_from = 0;           // first block that `tokens` has
    std::vector<uint32_t> tokens{};     // of matched blocks that were not in the pool at acquire
    std::vector<BlockExtras> extras{};  // of matched blocks
    std::vector<TransferId> depends{};  // transfers that fill held pages
    std::vector<BlockKey> unmatched{};  // keys of the full blocks after `matched`
    std::optional<Use> above{};         // the last matched block's, as acquire left it
    bool told = false;                  // the policy was told of `unmatched`
    bool touches = true;                // what is known of uses may change
    std::vector<uint32_t> marks{};      // of `unmatched`, as the policy expects; it may say none
    uint32_t computing_from = 0;        // of them, from here on registered in computing_

    uint32_t end() const { return first + static_cast<uint32_t>(held.size()); }
    Content skipped_content() const { return {skipped, extras, 0}; }
    Content content() const { return {tokens, extras, tokens_from}; }
  };

  Lease& get(LeaseId id);
  const Lease& get(LeaseId id) const;
  LeaseView view_of(LeaseId id, const Lease& lease) const;
  std::optional<Place> cursor(const Lease& lease) const;
  BlockKey last_key(const Lease& lease) const;
  std::optional<Place> step(const Lease& lease, Place at, uint32_t block) const;
  std::optional<Place> follow(const Lease& lease, Place at, uint32_t block) const;
  uint32_t hold(Lease& lease, const Run& run);
  void hold_leading(Lease& lease, const std::vector<Run>& path);
  void use(Lease& lease, const Found& found, const Request& request);
  void tell_asked(Lease& lease);
  void learn(const Lease& lease, const std::vector<Run>& path, const Request& request);
  std::vector<BlockKey> keys_after(const Lease& lease, const std::vector<Run>& path,
                                   const Content& content) const;
  void register_computing(Lease& lease, std::vector<BlockKey>&& keys);
  void unregister_computing(Lease& lease, uint32_t end);
  CommitResult commit_again(const Lease& lease, uint32_t position, const Block& block,
                            PageId page) const;
  CommitResult commit_next(Lease& lease, Place& at, const Block& block, PageId page);
  uint32_t commit_rest(Lease& lease, NodeId node, Tokens tokens, std::span<const PageId> pages);
  std::vector<uint32_t> marks_of(const Lease& lease, uint32_t from) const;
  void expect(const Lease& lease, uint32_t block, Place at);
  void learn_committed(const Lease& lease, size_t from);
  void lose_from(Lease& lease, const std::unordered_set<PageId>& failed);
  void let_go(PoolId pool, std::span<const Held> held);
  void check_held(LeaseId id, const Lease& lease) const;

  Pools& pools_;
  RadixTree& tree_;
  Transfers& transfers_;
  ReuseCurve& curve_;  // learns what leases ask for
  std::unordered_map<LeaseId, Lease> leases_;
  KeyTable computing_;  // how many leases compute a block
};

}  // namespace kvc2
