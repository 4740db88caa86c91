// Copies of blocks that are under way between two pools, or within one.
// In one sentence: *a transfer pins the pages that it reads and the pages that it fills, until the
// caller says how many of its blocks have come.*
//
//     pool gpu (source)  4 7 8        complete(done = 2)      4 7 8     as before
//                        | | |        ----------------->
//     pool cpu (target)  1 2 5                                1 2       resident
//                        in flight                            5         free again
//
// A transfer, from -> to [function]:
//   planned -> open    [start]          a plan that got no page is left where it is
//   open    -> broken  [pool_leaves]    one of its two pools is being removed: none of it counts
//   open, broken -> over  [complete, then free_failed for the blocks that have not come]
// A target page of a move is private, held; of any other transfer it is in flight.
//
// Laws; `check` proves them:
//   T1 A page is in flight just as long as one open transfer fills it, and only one ever does.
//   T2 The two pages of a pair belong to one block; of a move the source page does.
//   T3 The blocks of a transfer become resident in prefix order: where it has a block and the block
//      before that one, the one before comes first. Of a failed transfer the leading part stays.
//
// Costs: 8 bytes a page of an open transfer, and an entry of a hash map (some 40 bytes) for each
// page in flight. add is O(log nodes), since it may evict; start and complete are O(pages).
// Not thread-safe: the index holds its lock. Knows no lease: a lease's part in a transfer that
// failed is the caller's (Leases::lose). Moves no byte.
#pragma once

#include <algorithm>
#include <optional>
#include <span>
#include <unordered_map>
#include <variant>
#include <vector>

#include "index/claims.h"
#include "index/evictor.h"
#include "index/match.h"
#include "index/records.h"

namespace kvc2 {

using TransferId = uint64_t;

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

struct Wait {  // for a transfer of somebody else
  TransferId transfer;
};

using Load = std::variant<std::monostate, Transfer, Wait>;

class Transfers {
 public:
  static constexpr uint32_t kPagesMax = 256;    // of one transfer: a fifth of a millisecond's work
  static constexpr uint32_t kRefusalsMax = 64;  // of one call: as much

  struct Plan {
    PoolId source, target;  // the same: a move
    std::vector<PageId> source_pages{}, target_pages{};

    bool is_move() const { return source == target; }
    bool empty() const { return source_pages.empty(); }
    size_t size() const { return source_pages.size(); }
  };

  struct Ended {
    PoolId target;
    std::vector<PageId> failed{};  // of the target: in flight and pinned until `free_failed`
    std::vector<PageId> left{};    // of a move: the pages that its blocks have left, free now
  };

  Transfers(Pools& pools, RadixTree& tree, Evictor& evictor, uint64_t first_generation)
      : pools_(pools), tree_(tree), evictor_(evictor), generation_(first_generation) {}

  // Plans. What a plan has is pinned, so a plan that is not empty must be started.
  // One more block, which the source has and the target lacks: a page in the target, evicting
  // there; false if there is none to be had.
  bool add(Plan& plan, Place at) { return try_add(plan, at, {}).added; }
  bool offer(Plan& plan, Place at);  // the same, where the target may refuse it
  Transfer start(Plan&& plan);
  // `ahead`: free pages that the caller keeps in a durable pool below, which make it no less full.
  // Ends early, without a transfer, where many blocks were refused: then it is called again.
  struct Demotion {
    std::optional<Transfer> transfer{};
    bool more = false;
  };
  Demotion plan_demote(PoolId pool, uint32_t max_pages, uint32_t ahead);
  // What a pool of the chain has of these blocks, and the pool below it lacks, is to be demoted.
  void requeue(const Run& run, std::span<const PoolId> pools);
  // What `choose` answers while the block above the next one that is to come to a durable pool may
  // not go: a path that comes in several transfers would else be evicted as fast as it comes.
  template <typename Choose>
  auto sparing_the_next(PoolId pool, Choose&& choose) {
    const auto above = above_the_next(pool);
    if (!above) return choose();
    const PageId page = tree_.page(*above, pool);
    pools_.at(pool).pin(page);
    tree_.refresh(above->node);
    const auto chosen = choose();
    pools_.at(pool).unpin(page);
    tree_.refresh(above->node);
    return chosen;
  }
  // Nothing refuses this block any more on its way down this chain: it is queued again where it is,
  // and so it is in each pool that it comes to, till the last one has it.
  bool insist(Place at, std::span<const PoolId> pools);  // false: it is there
  std::optional<Transfer> plan_move(PoolId pool, uint32_t slab, uint32_t max_pages);
  // What brings the found blocks, which are those of `tokens`, one pool nearer to pools[0].
  Load prefetch(const Found& found, std::span<const PoolId> pools, const Content& prefix,
                uint32_t max_pages);

  // Ends. Throws UnknownId, or std::invalid_argument where `done` is more than the transfer has.
  Ended complete(TransferId id, uint32_t done);
  void free_failed(const Ended& ended);  // the blocks lose these pages
  void pool_leaves(PoolId pool);

  // Questions.
  std::optional<TransferId> into(PoolId pool, PageId page) const;  // the one that fills the page
  bool is_open(TransferId id) const { return open_.contains(id); }
  size_t size() const { return open_.size(); }
  // Whether the block of this page of `above` is not in `pool`, below it, only since no acquire has
  // matched it. False in all pools above but the first that has the block.
  bool kept_out(PoolId pool, PoolId above, PageId page) const;

  // Generations of pages in durable pools rise from here on above this one.
  void rise_above(uint64_t generation) { generation_ = std::max(generation_, generation + 1); }

  void claim(Claims& claims) const;
  void check() const;

 private:
  struct Open {
    Plan plan;
    bool broken = false;
  };

  struct How {
    bool sent_back = false;  // only where that evicts nothing that waits
    bool judged = false;     // the target may refuse it
    uint32_t ahead = 0;      // free pages of a durable target that make it no less full
    uint32_t max_pages = kPagesMax;
  };
  struct Tried {  // neither: there is no page to be had
    bool added = false;
    std::optional<Worths> refused{};
  };

  Tried try_add(Plan& plan, Place at, const How& how);
  Tried demote(Plan& plan, PageId page, const How& how);
  std::optional<Tried> end_of_path(const Plan& plan, Place at, const How& how);
  Newcomer newcomer(Place at, PoolId target) const;
  void refuse(const Plan& plan, std::span<const Place> blocks, const Worths& worths);
  void pass_on(const Plan& plan, uint32_t done);
  bool may_return(Place at, PoolId target);
  std::optional<Place> above_the_next(PoolId pool) const;
  std::vector<Place> missing_below(PoolId source, PoolId target, PageId page) const;
  Records records_of(const Plan& plan);
  std::vector<PageId> end_move(const Plan& move, uint32_t done);
  void arrive(PoolId target, PageId page);
  void check_pairs(TransferId id, const Plan& plan) const;

  Pools& pools_;
  RadixTree& tree_;
  Evictor& evictor_;
  std::unordered_map<TransferId, Open> open_;
  std::unordered_map<uint64_t, TransferId> in_flight_;  // by name_of(pool, target page)
  uint64_t generation_;                                 // of the next page that is filled
  TransferId last_ = 0;
};

}  // namespace kvc2
