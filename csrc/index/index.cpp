// Index: pools, slabs, private pages, quotas, eviction on demand, counts.
#include "index/index.h"

#include <algorithm>
#include <iterator>

namespace kvc2 {

PoolId Index::add_pool(const PagePool::Shape& shape) {
  const Lock lock(mutex_);
  return pools_.add(shape);
}

uint32_t Index::add_slab(PoolId id) {
  const Lock lock(mutex_);
  PagePool& to = pools_.at(id);
  if (to.closed) throw std::invalid_argument("pool: " + std::to_string(id) + " is closed");
  const uint32_t slab = to.add_slab();
  evictor_.tell_size(id);
  return slab;
}

bool Index::take_slab(PoolId id, uint32_t slab) {
  const Lock lock(mutex_);
  const bool taken = pools_.at(id).take_slab(slab);
  evictor_.tell_size(id);
  return taken;
}

bool Index::close_slab(PoolId id, uint32_t slab) {
  const Lock lock(mutex_);
  return pools_.at(id).close_slab(slab);
}

bool Index::reopen_slab(PoolId id, uint32_t slab) {
  const Lock lock(mutex_);
  return pools_.at(id).reopen_slab(slab);
}

std::vector<uint32_t> Index::slab_pages(PoolId id) const {
  const Lock lock(mutex_);
  return pools_.at(id).slab_pages();
}

std::optional<uint32_t> Index::victim_age(PoolId id) const {
  const Lock lock(mutex_);
  pools_.at(id);
  const auto oldest = tree_.oldest(id);
  if (!oldest) return std::nullopt;
  return stamp_ - tree_[oldest->node].uses[oldest->offset].stamp;
}

PagePool::Counts Index::pool_counts(PoolId id) const {
  const Lock lock(mutex_);
  return pools_.at(id).counts();
}

uint32_t Index::page_size(PoolId id) const {
  const Lock lock(mutex_);
  return pools_.at(id).shape.page_size;
}

// Once the pool is closed, no lease is opened in it and no page granted: the slices overlook none.
void Index::close_pool(PoolId id) {
  std::vector<LeaseId> leases;
  {
    const Lock lock(mutex_);
    pools_.at(id).closed = true;
    leases = leases_.in_pool(id);
    std::ranges::copy(key_leases_.in_pool(id), std::back_inserter(leases));
  }
  release_all(leases);
  in_slices(id, [&, page = PageId{0}]() mutable {
    PagePool& from = pools_.at(id);
    if (page == from.size()) return false;
    if (from.state(page) == PageState::kPrivate && !from[page].held) from.free(page);
    ++page;
    return true;
  });
}

// From the first slice on, no call knows the pool; the tree forgets its pages slice by slice.
void Index::remove_pool(PoolId id) {
  const PagePool& leaving = start_leaving(id);
  for (PageId begin = 0; begin < leaving.size();) {
    const Lock lock(mutex_);
    const PageId end = begin + std::min(leaving.size() - begin, kSlicePages);
    for (; begin < end; ++begin) {
      if (leaving.state(begin) < PageState::kInFlight) continue;
      evictor_.forget(tree_.owner(id, begin), id, Cause::kSessionEnded);
    }
  }
  const Lock lock(mutex_);
  tree_.forget_tenants(id);
  pools_.remove(id);
  evictor_.tell_size(id);
}

const PagePool& Index::start_leaving(PoolId id) {
  const Lock lock(mutex_);
  PagePool& leaving = pools_.at(id);
  if (!leaving.closed) throw std::invalid_argument("pool: close it first");
  for (PoolId other = 0; other < pools_.size(); ++other) {
    if (pools_.present(other) && pools_[other].shape.below == id) {
      throw std::invalid_argument("pool: it is below another one");
    }
  }
  transfers_.pool_leaves(id);
  leaving.leaving = true;
  tree_.pins.forget_pool(id);
  return leaving;
}

Evicted Index::trim(PoolId id) {
  Evicted evicted;
  in_slices(id, [&] {
    const auto victim = evictor_.victim_over_quota(id);
    if (victim) evictor_.evict(*victim, id, evicted);
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

Evicted Index::evict(PoolId id, uint32_t pages) {
  Evicted evicted;
  in_slices(id, [&] {
    if (evicted.pages.size() >= pages) return false;
    const auto victim = transfers_.sparing_the_next(id, [&] { return tree_.coldest(id); });
    if (victim) evictor_.evict(*victim, id, evicted);
    return victim.has_value();
  });
  return evicted;
}

Evicted Index::keep_free(PoolId id, uint32_t pages) {
  Evicted evicted;
  in_slices(id, [&] {
    const auto victim = pools_.at(id).counts().free < pages ? tree_.coldest(id) : std::nullopt;
    if (!victim || !tree_.resident_below(*victim, id)) return false;  // nor is what comes after it
    evictor_.evict(*victim, id, evicted);
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
    const PagePool& from = pools_.at(id);
    if (from.is(page, PageState::kResident) && from[page].pins == 0) {
      evictor_.take(tree_.owner(id, page), id, taken, Cause::kLost);
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
    if (pools_.at(id).closed) granted.clear();  // close_pool has freed them
    if (pools_.at(id).closed || granted.size() == pages) return false;
    const auto taken = static_cast<uint32_t>(granted.size());
    const auto page = evictor_.allocate(id, PageState::kPrivate, tenant, taken);
    if (page) granted.push_back(*page);
    return page.has_value();
  });
  return granted;
}

// A block that nothing is known of is taken as if it were asked for by its tenant alone.
Given Index::give(PoolId pool, TenantId tenant, const std::optional<Newcomer>& block,
                  uint32_t taken) {
  if (block) return evictor_.offer(pool, PageState::kPrivate, *block, taken);
  return {.page = evictor_.allocate(pool, PageState::kPrivate, tenant, taken)};
}

// The blocks are of one path: where one is refused, those below it are too.
std::vector<PageId> Index::grant_for(LeaseId id, uint32_t first_block, uint32_t blocks) {
  std::vector<PageId> granted;
  for (bool more = blocks > 0; more;) {
    const Lock lock(mutex_);
    const auto [pool, space] = leases_.where(id);
    if (pools_.at(pool).closed) return {};  // close_pool has freed them
    const auto begun = static_cast<uint32_t>(granted.size());
    const uint32_t slice = std::min(kSlicePages, blocks - begun);
    const auto newcomers = leases_.newcomers(id, first_block + begun, slice);
    for (uint32_t i = 0; more && i < slice; ++i) {
      const uint32_t taken = begun + i;
      const auto block = i < newcomers.size() ? newcomers[i] : std::nullopt;
      const Given given = give(pool, tree_.spaces[space].tenant, block, taken);
      if (given.page) granted.push_back(*given.page);
      more = given.page && granted.size() < blocks;
      if (!given.refused) continue;
      for (const auto& below : leases_.newcomers(id, first_block + taken, blocks - taken)) {
        if (below) evictor_.note_refusal(pool, below->key, *given.refused);
      }
    }
  }
  return granted;
}

// Each key is for itself.
std::vector<PageId> Index::grant_for_keys(LeaseId id, std::span<const KeyBlock> keys) {
  const Lock lock(mutex_);
  std::vector<PageId> pages(keys.size(), kNoPage);
  const auto [pool, space] = key_leases_.where(id);
  if (pools_.at(pool).closed) return pages;
  const auto newcomers = key_leases_.newcomers(id, keys);
  uint32_t taken = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const Given given = give(pool, tree_.spaces[space].tenant, newcomers[i], taken);
    if (given.refused) evictor_.note_refusal(pool, newcomers[i]->key, *given.refused);
    if (!given.page) continue;
    pages[i] = *given.page;
    ++taken;
  }
  return pages;
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
  PagePool& from = pools_.at(id);
  if (from.closed || !all_in(from, pages, PageState::kFree)) return false;
  for (const PageId page : pages) from.take(page, PageState::kPrivate);
  return true;
}

bool Index::give_back(PoolId id, std::span<const PageId> pages) {
  const Lock lock(mutex_);
  PagePool& to = pools_.at(id);
  if (!all_in(to, pages, PageState::kPrivate)) return false;
  if (std::ranges::any_of(pages, [&](PageId page) { return to[page].held; })) return false;
  for (const PageId page : pages) to.free(page);
  return true;
}

std::vector<uint32_t> Index::stamps(PoolId id) const {
  std::vector<uint32_t> stamps;  // by page; the pool may grow between slices
  in_slices(id, [&] {
    const PagePool& of = pools_.at(id);
    const auto page = static_cast<PageId>(stamps.size());
    if (page == of.size()) return false;
    const bool there = of.state(page) == PageState::kResident;
    const Place at = there ? tree_.owner(id, page) : Place{};
    stamps.push_back(there ? tree_[at.node].uses[at.offset].stamp : 0);
    return true;
  });
  return stamps;
}

// The bytes are counted in slices of the nodes, so that they are not of one moment.
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
  for (PoolId id = 0; id < pools_.size(); ++id) {
    bytes += pools_.present(id) ? pools_[id].metadata_bytes() : 0;
  }
  return {.namespaces = tree_.open_spaces(),
          .nodes = tree_.live_nodes,
          .blocks = tree_.blocks - tree_.holes,
          .holes = tree_.holes,
          .leases = leases_.size() + key_leases_.size(),
          .transfers = transfers_.size(),
          .metadata_bytes = bytes,
          .collisions = tree_.collisions,
          .deaths = evictor_.obituaries().deaths(),
          .dead_known = evictor_.obituaries().known(),
          .dead_bytes = evictor_.obituaries().metadata_bytes()};
}

std::pair<KvEvents, bool> Index::take_kv_events(uint32_t scan_pages) {
  const Lock lock(mutex_);
  if (tree_.events.empty()) tree_.tell_some(scan_pages);
  KvEvents taken = tree_.events.take();
  return {std::move(taken), !tree_.events.empty() || tree_.events.scan};
}

void Index::tell_kv_events_anew() {
  const Lock lock(mutex_);
  tree_.events.tell_anew();
}

uint64_t Index::kv_event_overflows() const {
  const Lock lock(mutex_);
  return tree_.events.overflows();
}

}  // namespace kvc2
