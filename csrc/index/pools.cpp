// Index: pools, slabs, private pages, eviction and counts.
#include <algorithm>

#include "base/check.h"
#include "index/index.h"

namespace kvc2 {

using Lock = std::lock_guard<std::mutex>;

PagePool& Index::pool(PoolId id) const {
  if (!alive(id)) throw UnknownId("pool " + std::to_string(id));
  return *pools_[id];
}

std::vector<PoolId> Index::chain(PoolId head) const {
  std::vector<PoolId> pools{head};
  while (const auto below = pool(pools.back()).shape.below) pools.push_back(*below);
  return pools;
}

PoolId Index::add_pool(const PagePool::Shape& shape) {
  const Lock lock(mutex_);
  if (shape.page_size == 0 || shape.page_size > kMaxPageSize) {
    throw std::invalid_argument("page_size: 1 to 512");
  }
  if (shape.pages_per_slab == 0 || shape.pages_per_slab >= kNoPage) {
    throw std::invalid_argument("pages_per_slab: at least 1");
  }
  if (shape.durable && shape.below) {
    throw std::invalid_argument("below: a durable pool is the last of its chain");
  }
  if (shape.below && pool(*shape.below).shape.page_size != shape.page_size) {
    throw std::invalid_argument("page_size: not that of the pool below");
  }
  pools_.push_back(std::make_unique<PagePool>(shape));
  return static_cast<PoolId>(pools_.size() - 1);
}

uint32_t Index::add_slab(PoolId id) {
  const Lock lock(mutex_);
  PagePool& to = pool(id);
  if (to.closed) throw std::invalid_argument("pool: " + std::to_string(id) + " is closed");
  return to.add_slab();
}

bool Index::take_slab(PoolId id, uint32_t slab) {
  const Lock lock(mutex_);
  return pool(id).take_slab(slab);
}

bool Index::close_slab(PoolId id, uint32_t slab) {
  const Lock lock(mutex_);
  return pool(id).close_slab(slab);
}

bool Index::reopen_slab(PoolId id, uint32_t slab) {
  const Lock lock(mutex_);
  return pool(id).reopen_slab(slab);
}

std::vector<uint32_t> Index::slab_pages(PoolId id) const {
  const Lock lock(mutex_);
  return pool(id).slab_pages();
}

std::optional<uint32_t> Index::victim_age(PoolId id) const {
  const Lock lock(mutex_);
  pool(id);
  const auto victim = tree_.coldest(id);
  if (!victim) return std::nullopt;
  return stamp_ - tree_[victim->node].stamps[victim->offset];
}

PagePool::Counts Index::pool_counts(PoolId id) const {
  const Lock lock(mutex_);
  return pool(id).counts();
}

uint32_t Index::page_size(PoolId id) const {
  const Lock lock(mutex_);
  return pool(id).shape.page_size;
}

void Index::close_pool(PoolId id) {
  const Lock lock(mutex_);
  PagePool& closing = pool(id);
  closing.closed = true;
  for (auto lease = leases_.begin(); lease != leases_.end();) {
    if (lease->second.pool != id) {
      ++lease;
      continue;
    }
    close_lease(lease->second);
    lease = leases_.erase(lease);
  }
  for (PageId page = 0; page < closing.size(); ++page) {
    if (closing.state(page) == PageState::kPrivate && !closing[page].held) closing.free(page);
  }
}

void Index::remove_pool(PoolId id) {
  const Lock lock(mutex_);
  PagePool& leaving = pool(id);
  if (!leaving.closed) throw std::invalid_argument("pool: close it first");
  for (const auto& other : pools_) {
    if (other && other->shape.below == id) {
      throw std::invalid_argument("pool: it is below another one");
    }
  }
  for (auto& [transfer, open] : transfers_) {
    if (open.source != id && open.target != id) continue;
    open.failed = true;
    if (open.target != id) continue;
    for (const PageId page : open.target_pages) in_flight_.erase(uint64_t{id} << 32 | page);
  }
  for (PageId page = 0; page < leaving.size(); ++page) {
    if (leaving.state(page) < PageState::kInFlight) continue;
    const Place at = tree_.owner(id, page);
    tree_.clear(at, id);
    tree_.refresh(at.node);
    tree_.trim(at.node);
  }
  pools_[id] = nullptr;
}

std::optional<PageId> Index::allocate(PoolId id, PageState to) {
  PagePool& from = pool(id);
  while (true) {  // what is evicted from a closed slab leaves no free page
    if (const auto page = from.allocate(to)) return page;
    const auto victim = from.shape.durable ? std::nullopt : tree_.coldest(id);
    if (!victim) return std::nullopt;
    from.count_eviction(!tree_.resident_elsewhere(*victim, id));
    drop(*victim, id);
  }
}

void Index::drop(Place at, PoolId id) {
  pool(id).free(tree_.clear(at, id));
  tree_.refresh(at.node);
  tree_.trim(at.node);
}

void Index::evict_at(Place at, PoolId id, Evicted& evicted) {
  pool(id).count_eviction(!tree_.resident_elsewhere(at, id));
  take_away(at, id, evicted);
}

void Index::take_away(Place at, PoolId id, Evicted& taken) {
  taken.pages.push_back(tree_.page(at, id));
  if (pool(id).shape.durable) taken.digests.push_back(tree_.digest(at));
  if (!tree_.resident_elsewhere(at, id)) ++taken.last_copies;
  drop(at, id);
}

// `at` and what lies below it in the pool, tail first, as far as I3 and I4 let it go.
void Index::evict_below(Place at, PoolId id, Evicted& evicted) {
  const std::vector<NodeId> nodes = tree_.subtree(at.node, id);
  for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {
    while (const auto last = tree_.evictable(*node, id)) {
      if (*node == at.node && last->offset < at.offset) break;
      evict_at(*last, id, evicted);
    }
  }
}

Evicted Index::empty_slab(PoolId id, uint32_t slab) {
  const Lock lock(mutex_);
  PagePool& from = pool(id);
  Evicted evicted;
  const uint32_t first = slab * from.shape.pages_per_slab;
  for (PageId page = first; page < first + from.shape.pages_per_slab; ++page) {
    if (from.is(page, PageState::kResident)) evict_below(tree_.owner(id, page), id, evicted);
  }
  return evicted;
}

Evicted Index::evict(PoolId id, uint32_t pages) {
  const Lock lock(mutex_);
  pool(id);
  Evicted evicted;
  while (evicted.pages.size() < pages) {
    const auto victim = tree_.coldest(id);
    if (!victim) break;
    evict_at(*victim, id, evicted);
  }
  return evicted;
}

Evicted Index::keep_free(PoolId id, uint32_t pages) {
  const Lock lock(mutex_);
  const PagePool& from = pool(id);
  Evicted evicted;
  while (from.counts().free < pages) {
    const auto victim = tree_.coldest(id);
    if (!victim || !tree_.resident_below(*victim, id)) break;  // the rest are not held below either
    evict_at(*victim, id, evicted);
  }
  return evicted;
}

Evicted Index::lost(PoolId id, std::span<const PageId> pages) {
  const Lock lock(mutex_);
  PagePool& from = pool(id);
  Evicted taken;
  for (const PageId page : pages) {
    if (!from.is(page, PageState::kResident) || from[page].pins > 0) continue;
    take_away(tree_.owner(id, page), id, taken);
  }
  return taken;
}

std::vector<PageId> Index::grant(PoolId id, uint32_t pages) {
  const Lock lock(mutex_);
  std::vector<PageId> granted;
  if (pool(id).closed) return granted;
  while (granted.size() < pages) {
    const auto page = allocate(id, PageState::kPrivate);
    if (!page) break;
    granted.push_back(*page);
  }
  return granted;
}

// True if the pages are distinct and each is in that state.
static bool all_in(const PagePool& pool, std::span<const PageId> pages, PageState state) {
  std::vector<PageId> sorted(pages.begin(), pages.end());
  std::ranges::sort(sorted);
  if (std::ranges::adjacent_find(sorted) != sorted.end()) return false;
  return std::ranges::all_of(pages, [&](PageId page) { return pool.is(page, state); });
}

bool Index::keep(PoolId id, std::span<const PageId> pages) {
  const Lock lock(mutex_);
  PagePool& from = pool(id);
  if (from.closed || !all_in(from, pages, PageState::kFree)) return false;
  for (const PageId page : pages) from.take(page, PageState::kPrivate);
  return true;
}

bool Index::give_back(PoolId id, std::span<const PageId> pages) {
  const Lock lock(mutex_);
  PagePool& to = pool(id);
  if (!all_in(to, pages, PageState::kPrivate)) return false;
  if (std::ranges::any_of(pages, [&](PageId page) { return to[page].held; })) return false;
  for (const PageId page : pages) to.free(page);
  return true;
}

std::vector<uint32_t> Index::stamps(PoolId id) const {
  const Lock lock(mutex_);
  const PagePool& of = pool(id);
  std::vector<uint32_t> stamps(of.size(), 0);
  for (PageId page = 0; page < of.size(); ++page) {
    if (of.state(page) != PageState::kResident) continue;
    const Place at = tree_.owner(id, page);
    stamps[page] = tree_[at.node].stamps[at.offset];
  }
  return stamps;
}

IndexCounts Index::counts() const {
  const Lock lock(mutex_);
  size_t bytes = tree_.metadata_bytes();
  for (const auto& each : pools_) bytes += each ? each->metadata_bytes() : 0;
  return {.namespaces = tree_.spaces.size(),
          .nodes = tree_.live_nodes,
          .blocks = tree_.blocks - tree_.holes,
          .holes = tree_.holes,
          .leases = leases_.size(),
          .transfers = transfers_.size(),
          .metadata_bytes = bytes,
          .collisions = collisions_};
}

}  // namespace kvc2
