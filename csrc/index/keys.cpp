// Index: requests for opaque keys. Each is the one block of a path of its own (block_key.h), so
// that pools, evictions, transfers and lives are those of all blocks.
#include <algorithm>

#include "index/index.h"

namespace kvc2 {

void Index::check_keys(uint32_t space, PoolId pool) const {
  check_space(space, pool);
  if (!tree_.spaces[space].opaque) {
    throw std::invalid_argument("namespace: its blocks are named by tokens, not by keys");
  }
}

std::vector<uint8_t> Index::match_keys(uint32_t space, PoolId head,
                                       std::span<const KeyBlock> keys) const {
  const Lock lock(mutex_);
  check_keys(space, head);
  const std::vector<PoolId> pools = pools_.chain(head);
  std::vector<uint8_t> found;
  found.reserve(keys.size());
  for (const KeyBlock& key : keys) found.push_back(key_leases_.find(space, pools, key));
  return found;
}

std::vector<Explanation> Index::explain_keys(uint32_t space, std::span<const PoolId> pools,
                                             std::span<const KeyBlock> keys) const {
  const Lock lock(mutex_);
  if (pools.empty() || pools.size() > 0xFF) throw std::invalid_argument("pools: 1 to 255 of them");
  for (const PoolId each : pools) check_keys(space, each);
  std::vector<Explanation> found;
  for (const KeyBlock& key : keys) {
    const Found at = find_resident(tree_, space, pools, tree_.find(space, key));
    found.push_back(explanation_of(tree_, evictor_.obituaries(), at, key, 0));
  }
  return found;
}

KeyLeaseView Index::acquire_keys(uint32_t space, PoolId head, std::span<const KeyBlock> keys,
                                 const Hints& hints, bool touches) {
  const Lock lock(mutex_);
  check_keys(space, head);
  check_leasable(head);
  const std::vector<PoolId> pools = pools_.chain(head);
  const LeaseId id = ++last_lease_;
  key_leases_.open(id, {space, pools, keys, tick(), hints, touches});
  return key_leases_.view(id);
}

KeyLeaseView Index::key_lease(LeaseId id) const {
  const Lock lock(mutex_);
  return key_leases_.view(id);
}

// In slices. Where the lease is released between two slices, the next one throws UnknownId.
std::vector<CommitResult> Index::commit_keys(uint32_t space, PoolId pool,
                                             std::span<const KeyBlock> keys,
                                             std::span<const PageId> pages,
                                             std::optional<LeaseId> lease, const Hints& hints) {
  if (pages.size() != keys.size()) throw std::invalid_argument("pages: not one for each of keys");
  std::vector<CommitResult> results;
  do {
    const Lock lock(mutex_);
    check_keys(space, pool);
    const uint32_t stamp = lease ? 0 : tick();
    const size_t done = results.size(), slice = std::min<size_t>(keys.size() - done, kSlicePages);
    const auto added = key_leases_.commit(
        {space, pool, keys.subspan(done, slice), pages.subspan(done, slice), stamp, hints}, lease);
    results.insert(results.end(), added.begin(), added.end());
  } while (results.size() < keys.size());
  return results;
}

Load Index::prefetch_keys(uint32_t space, PoolId head, std::span<const KeyBlock> keys,
                          uint32_t max_pages, bool touches) {
  const Lock lock(mutex_);
  check_keys(space, head);
  const std::vector<PoolId> pools = pools_.chain(head);
  if (touches) {
    const uint32_t stamp = tick();
    for (const KeyBlock& key : keys) {
      if (key_leases_.find(space, pools, key) == 0) continue;
      for (const Run& run : tree_.find(space, key)) tree_.touch(run, stamp);
    }
  }
  return key_leases_.prefetch(space, pools, keys, max_pages, true);
}

// One pin a key, so that each may be ended for itself.
std::vector<uint8_t> Index::pin_keys(uint32_t space, PoolId pool, std::span<const KeyBlock> keys,
                                     const Keeping& as) {
  const Lock lock(mutex_);
  check_keys(space, pool);
  std::vector<uint8_t> pinned;
  for (const KeyBlock& key : keys) pinned.push_back(pin_path(space, pool, key, as));
  return pinned;
}

std::vector<uint8_t> Index::unpin_keys(uint32_t space, PoolId pool,
                                       std::span<const KeyBlock> keys) {
  const Lock lock(mutex_);
  check_keys(space, pool);
  std::vector<uint8_t> ended;
  for (const KeyBlock& key : keys) ended.push_back(unpin_path(space, pool, key) > 0);
  return ended;
}

}  // namespace kvc2
