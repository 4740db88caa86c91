// Index: pools, slabs, private pages, eviction and counts.
#include <algorithm>

#include "base/check.h"
#include "index/index.h"

namespace kvc2 {

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
  const uint32_t slab = to.add_slab();
  tell_size(id);
  return slab;
}

// The policy hears of a pool's size when it has grown by a quarter or shrunk to half.
void Index::tell_size(PoolId id) {
  if (id >= told_pages_.size()) told_pages_.resize(id + 1, 0);
  const uint32_t pages = alive(id) ? pools_[id]->counts().pages : 0;
  uint32_t& told = told_pages_[id];
  if (pages >= told / 2 && pages <= uint64_t{told} * 5 / 4) return;
  told = pages;
  policy_->resize(id, pages);
}

bool Index::take_slab(PoolId id, uint32_t slab) {
  const Lock lock(mutex_);
  const bool taken = pool(id).take_slab(slab);
  tell_size(id);
  return taken;
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
  const auto oldest = tree_.oldest(id);
  if (!oldest) return std::nullopt;
  return stamp_ - tree_[oldest->node].uses[oldest->offset].stamp;
}

PagePool::Counts Index::pool_counts(PoolId id) const {
  const Lock lock(mutex_);
  return pool(id).counts();
}

uint32_t Index::page_size(PoolId id) const {
  const Lock lock(mutex_);
  return pool(id).shape.page_size;
}

// Once it is closed no lease is opened in it and no page granted, so nothing is overlooked.
void Index::close_pool(PoolId id) {
  std::vector<LeaseId> leases;
  {
    const Lock lock(mutex_);
    pool(id).closed = true;
    for (const auto& [lease, open] : leases_) {
      if (open.pool == id) leases.push_back(lease);
    }
  }
  for (const LeaseId lease : leases) {
    const Lock lock(mutex_);
    const auto open = leases_.find(lease);
    if (open == leases_.end()) continue;
    close_lease(open->second);
    leases_.erase(open);
  }
  in_slices(id, [&, page = PageId{0}, &from = *pools_[id]]() mutable {
    if (page == from.size()) return false;
    if (from.state(page) == PageState::kPrivate && !from[page].held) from.free(page);
    ++page;
    return true;
  });
}

// From the first slice on the pool is unknown to every call; the tree forgets its pages by and by.
void Index::remove_pool(PoolId id) {
  const PagePool& leaving = start_leaving(id);
  for (PageId begin = 0; begin < leaving.size();) {
    const Lock lock(mutex_);
    const PageId end = begin + std::min(leaving.size() - begin, kSlicePages);
    for (; begin < end; ++begin) {
      if (leaving.state(begin) < PageState::kInFlight) continue;
      const Place at = tree_.owner(id, begin);
      clear(at, id, Cause::kSessionEnded);
      tree_.refresh(at.node);
      tree_.trim(at.node);
    }
  }
  const Lock lock(mutex_);
  tree_.forget_tenants(id);
  pools_[id] = nullptr;
  tell_size(id);
}

const PagePool& Index::start_leaving(PoolId id) {
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
  leaving.leaving = true;
  tree_.pins.forget_pool(id);
  return leaving;
}

// Whose quota is exceeded pays first, then who asks and has no room left in its own.
std::optional<Place> Index::victim_for(PoolId id, TenantId tenant, uint32_t taken) {
  if (const auto victim = victim_of_over(id)) return victim;
  const PagePool::Shape& shape = pool(id).shape;
  const Quota* own = tree_.quotas.find(tenant, shape.tier);
  if (own && own->full(uint64_t{taken} + 1, shape.page_bytes)) {
    if (const auto victim = tree_.coldest_of(tenant, id)) return victim;
  }
  return tree_.coldest(id);
}

std::optional<Place> Index::victim_of_over(PoolId id) {
  for (const TenantId tenant : tree_.quotas.over(pool(id).shape.tier)) {
    if (const auto victim = tree_.coldest_of(tenant, id)) return victim;
  }
  return std::nullopt;
}

Evicted Index::trim(PoolId id) {
  Evicted evicted;
  in_slices(id, [&] {
    const auto victim = victim_of_over(id);
    if (victim) evict_at(*victim, id, evicted);
    return victim.has_value();
  });
  return evicted;
}

void Index::set_quota(TenantId tenant, uint8_t tier, uint64_t max_bytes, uint64_t max_blocks) {
  const Lock lock(mutex_);
  const auto has = [&](const Space& space) { return space.tenant == tenant; };
  if (tenant == 0) throw std::invalid_argument("tenant: 1 or more");
  if (!tree_.quotas.find(tenant, tier) && std::ranges::any_of(tree_.spaces, has)) {
    throw std::invalid_argument("tenant: its first quota comes before its namespaces");
  }
  tree_.quotas.set(tenant, tier, max_bytes, max_blocks);
}

void Index::set_tenant(uint32_t space, TenantId tenant) {
  const Lock lock(mutex_);
  const TenantId known = open_space(space).tenant;
  if (known == tenant) return;
  if (known != 0) throw std::invalid_argument("tenant: the namespace has another one");
  tree_.set_tenant(space, tenant);
}

Quota Index::quota(TenantId tenant, uint8_t tier) const {
  const Lock lock(mutex_);
  const Quota* found = tree_.quotas.find(tenant, tier);
  return found ? *found : Quota{};
}

std::optional<PageId> Index::allocate(PoolId id, PageState to, TenantId tenant, uint32_t taken) {
  PagePool& from = pool(id);
  while (true) {  // what is evicted from a closed slab leaves no free page
    if (const auto page = from.allocate(to)) return page;
    const auto victim = from.shape.durable ? std::nullopt : victim_for(id, tenant, taken);
    if (!victim) return std::nullopt;
    count_eviction(*victim, id);
    drop(*victim, id, Cause::kEvicted);
  }
}

PageId Index::clear(Place at, PoolId id, Cause cause) {
  const PageId page = tree_.clear(at, id);
  if (!tree_.anywhere(at)) bury(at, id, cause);
  return page;
}

void Index::drop(Place at, PoolId id, Cause cause) {
  pool(id).free(clear(at, id, cause));
  tree_.refresh(at.node);
  tree_.trim(at.node);
}

// What is evicted before the pool below has it comes again from those above that still have it.
void Index::count_eviction(Place at, PoolId id) {
  pool(id).count_eviction(!tree_.resident_elsewhere(at, id));
  const auto below = pool(id).shape.below;
  if (!below || tree_.resident_below(at, id) || !admitted(at, *below)) return;
  for (const Residency& in : tree_[at.node].pools) {
    if (pools_[in.pool]->shape.below == id && tree_.resident(at, in.pool)) {
      pools_[in.pool]->send_back(tree_.page(at, in.pool));
    }
  }
}

void Index::evict_at(Place at, PoolId id, Evicted& evicted) {
  count_eviction(at, id);
  take_away(at, id, evicted, Cause::kEvicted);
}

void Index::take_away(Place at, PoolId id, Evicted& taken, Cause cause) {
  taken.pages.push_back(tree_.page(at, id));
  if (pool(id).shape.durable) taken.digests.push_back(tree_.digest(at));
  if (!tree_.resident_elsewhere(at, id)) ++taken.last_copies;
  drop(at, id, cause);
}

Evicted Index::evict(PoolId id, uint32_t pages) {
  Evicted evicted;
  in_slices(id, [&] {
    const auto victim = evicted.pages.size() < pages ? tree_.coldest(id) : std::nullopt;
    if (victim) evict_at(*victim, id, evicted);
    return victim.has_value();
  });
  return evicted;
}

Evicted Index::keep_free(PoolId id, uint32_t pages) {
  Evicted evicted;
  in_slices(id, [&] {
    const auto victim = pool(id).counts().free < pages ? tree_.coldest(id) : std::nullopt;
    if (!victim || !tree_.resident_below(*victim, id)) return false;  // nor is what comes after it
    evict_at(*victim, id, evicted);
    return true;
  });
  return evicted;
}

Evicted Index::lost(PoolId id, std::span<const PageId> pages) {
  Evicted taken;
  in_slices(id, [&] {
    if (pages.empty()) return false;
    const PageId page = pages.front();
    pages = pages.subspan(1);
    const PagePool& from = pool(id);
    if (from.is(page, PageState::kResident) && from[page].pins == 0) {
      take_away(tree_.owner(id, page), id, taken, Cause::kLost);
    }
    return true;
  });
  return taken;
}

std::vector<PageId> Index::grant(PoolId id, uint32_t pages, std::optional<uint32_t> space) {
  std::vector<PageId> granted;
  TenantId tenant = 0;
  if (space) {
    const Lock lock(mutex_);
    check_space(*space, id);
    tenant = tree_.spaces[*space].tenant;
  }
  in_slices(id, [&] {
    if (pool(id).closed) granted.clear();  // close_pool has freed them
    if (pool(id).closed || granted.size() == pages) return false;
    const auto taken = static_cast<uint32_t>(granted.size());
    const auto page = allocate(id, PageState::kPrivate, tenant, taken);
    if (page) granted.push_back(*page);
    return page.has_value();
  });
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
  std::vector<uint32_t> stamps;  // by page; the pool may grow between slices
  in_slices(id, [&] {
    const PagePool& of = pool(id);
    const auto page = static_cast<PageId>(stamps.size());
    if (page == of.size()) return false;
    const bool there = of.state(page) == PageState::kResident;
    const Place at = there ? tree_.owner(id, page) : Place{};
    stamps.push_back(there ? tree_[at.node].uses[at.offset].stamp : 0);
    return true;
  });
  return stamps;
}

// The bytes are counted node by node, in slices: they are of a moment each.
IndexCounts Index::counts() const {
  size_t bytes = 0;
  for (NodeId begin = 0, nodes = 1; begin < nodes; begin += kSlicePages) {
    const Lock lock(mutex_);
    nodes = tree_.node_ids();
    bytes += tree_.metadata_bytes(begin, std::min(nodes, begin + kSlicePages));
  }
  const Lock lock(mutex_);
  bytes += tree_.table_bytes() + policy_->metadata_bytes() + curve_.metadata_bytes();
  bytes += tree_.pins.metadata_bytes();
  for (const auto& each : pools_) bytes += each ? each->metadata_bytes() : 0;
  return {.namespaces = tree_.open_spaces(),
          .nodes = tree_.live_nodes,
          .blocks = tree_.blocks - tree_.holes,
          .holes = tree_.holes,
          .leases = leases_.size(),
          .transfers = transfers_.size(),
          .metadata_bytes = bytes,
          .collisions = collisions_,
          .deaths = obituaries_.deaths(),
          .dead_known = obituaries_.known(),
          .dead_bytes = obituaries_.metadata_bytes()};
}

}  // namespace kvc2
