// The open leases on opaque keys: objects that their engine names itself, each a block of its own.
// In one sentence: *a lease pins, in one pool, the pages of those of its keys that are there.*
//
//     keys     k0  k1  k2  k3        k1 is in no pool of the chain, k3 in a slower one: its page is
//     pages     4   -   7   -        the lease's as soon as it is brought
//
// A key of a lease, from -> to [function]:
//   (asked for) -> held    [open]     its page is in the lease's pool, or on its way there
//   (asked for) -> found   [open]     it is in a pool further down the chain
//   (asked for) -> absent  [open]     it is in none; nothing more becomes of it
//   found -> held          [promote]
//   held  -> found         [lose]     the transfer that filled its page has failed
//   (put) -> held          [commit]   a block that this lease has made
// The keys of a lease know nothing of each other: any may be missing, and each is brought, lost and
// committed for itself. So there is no cursor, no computing and no duplicate to keep: a page whose
// block is there already stays private, the caller's.
//
// Law: L4 of leases.h. Costs: 80 bytes a key; each call is O(keys), a hash and some looks at memory
// for each; `lose` walks all leases. Not thread-safe: the index holds its lock.
#pragma once

#include <span>
#include <unordered_map>
#include <vector>

#include "index/leases.h"

namespace kvc2 {

struct KeyLeaseView {
  LeaseId id;
  std::vector<uint8_t> found;    // by key: 0, or 1 + the place in the chain of the fastest pool
  std::vector<PageId> pages;     // by key: kNoPage where it is not in the lease's pool
  std::vector<uint8_t> arrived;  // by key: 1 where its page is there, and not being filled
  TransferId transfer;           // the last one that fills one of the pages; 0: none does
};

class KeyLeases {
 public:
  struct Request {
    uint32_t space;
    std::span<const PoolId> pools;  // the chain of the lease's pool
    std::span<const KeyBlock> keys;
    uint32_t stamp;
    const Hints& hints;
    bool touches;  // it is a use; else nothing is learnt of it
  };
  struct Commit {
    uint32_t space;
    PoolId pool;
    std::span<const KeyBlock> keys;
    std::span<const PageId> pages;  // one a key
    uint32_t stamp;
    Hints hints;
  };

  KeyLeases(Pools& pools, RadixTree& tree, Transfers& transfers)
      : pools_(pools), tree_(tree), transfers_(transfers) {}

  // What a request finds of one key: 0, or 1 + the place in the chain.
  uint8_t find(uint32_t space, std::span<const PoolId> pools, const KeyBlock& key) const;
  // Of the pools' chain, what brings some of the keys one pool nearer to pools[0]. judged: a pool
  // may refuse them.
  Load prefetch(uint32_t space, std::span<const PoolId> pools, std::span<const KeyBlock> keys,
                uint32_t max_pages, bool judged);
  // With a lease, of the same namespace and pool, its stamp and hints count, and it holds what is
  // adopted.
  std::vector<CommitResult> commit(Commit asked, std::optional<LeaseId> lease);

  // Each throws UnknownId for a lease that is not open.
  void open(LeaseId id, const Request& request);
  KeyLeaseView view(LeaseId id) const;
  Load next_load(LeaseId id, uint32_t max_pages);
  std::optional<Transfer> promote(LeaseId id, uint32_t max_pages);
  void release(LeaseId id, const Hints& hints);
  uint32_t held_in(LeaseId id, PoolId pool) const;

  // By key: as one that the lease's pool may refuse; none where the lease has not asked for it.
  std::vector<std::optional<Newcomer>> newcomers(LeaseId id, std::span<const KeyBlock> keys) const;
  void insist(LeaseId id);
  Leases::Where where(LeaseId id) const { return {get(id).pool, get(id).space}; }

  bool has(LeaseId id) const { return leases_.contains(id); }
  std::vector<LeaseId> in_pool(PoolId pool) const;
  bool use_space(uint32_t space) const;
  bool close(LeaseId id);  // false, and nothing, where the lease is not open any more
  void lose(PoolId pool, std::span<const PageId> pages);  // these are about to be free
  void halve_stamps();

  size_t size() const { return leases_.size(); }
  void claim(Claims& claims) const;
  void check() const;

 private:
  struct Lease {
    uint32_t space;
    PoolId pool;
    uint32_t stamp;
    Hints hints;
    std::vector<KeyBlock> keys;   // asked for, then those that it has committed
    std::vector<uint8_t> found;   // by key asked for
    std::vector<uint32_t> marks;  // the same: of one that was not found, if the policy says one
    std::vector<PageId> pages{};  // by key, pinned; or kNoPage
  };

  BlockKey name_of(uint32_t space, const KeyBlock& key) const;
  Lease& get(LeaseId id);
  const Lease& get(LeaseId id) const;
  std::optional<Place> place_of(uint32_t space,
                                const KeyBlock& key) const;  // none where it is dead
  void use(Lease& lease, size_t key, std::optional<Place> at, const Request& request);
  void hold(Lease& lease, size_t key, Place at);
  CommitResult commit_one(const Commit& asked, size_t i);

  Pools& pools_;
  RadixTree& tree_;
  Transfers& transfers_;
  std::unordered_map<LeaseId, Lease> leases_;
};

}  // namespace kvc2
