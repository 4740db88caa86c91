// The tree's second part: which block has a page in which pool, and which pages may be evicted.
#include <algorithm>

#include "base/check.h"
#include "index/radix_tree.h"

namespace kvc2 {

template <typename AnyNode>
static auto* residency_of(AnyNode& node, PoolId pool) {
  const auto found = std::ranges::find(node.pools, pool, &Residency::pool);
  return found == node.pools.end() ? nullptr : &*found;
}

Residency* RadixTree::find_residency(Node& node, PoolId pool) { return residency_of(node, pool); }

const Residency* RadixTree::find_residency(const Node& node, PoolId pool) {
  return residency_of(node, pool);
}

Residency& RadixTree::residency(Node& node, PoolId pool) const {
  if (Residency* in = find_residency(node, pool)) return *in;
  node.pools.push_back({.pool = pool, .pages = {}});
  return node.pools.back();
}

void RadixTree::drop_residency(NodeId id, PoolId pool) {
  Node& node = nodes_[id];
  Residency* in = find_residency(node, pool);
  set_rank(id, *in, kNotEvictable);
  node.pools.erase(node.pools.begin() + (in - node.pools.data()));
}

EvictionOrder& RadixTree::order(PoolId pool) {
  if (pool >= orders_.size()) orders_.resize(pool + 1);
  return orders_[pool];
}

void RadixTree::set_rank(NodeId node, Residency& in, Rank rank) {
  if (in.rank == rank) return;
  order(in.pool).move(node, in.rank, rank);
  if (quota(node, in.pool)) {
    tenant_orders_[{in.pool, spaces[nodes_[node].space].tenant}].move(node, in.rank, rank);
  }
  in.rank = rank;
}

PageId RadixTree::page(Place at, PoolId pool) const {
  const Residency* in = find_residency(nodes_[at.node], pool);
  return in && at.offset < in->pages.size() ? in->pages[at.offset] : kNoPage;
}

std::span<const PageId> RadixTree::pages(const Run& run, PoolId pool) const {
  const Residency* in = find_residency(nodes_[run.node], pool);
  if (!in || in->pages.size() <= run.offset) return {};
  const std::span<const PageId> from = std::span(in->pages).subspan(run.offset);
  return from.first(std::min<size_t>(from.size(), run.blocks));
}

// Where no page of the node is missing or arriving, its counts answer: at millions of blocks, a
// look at each page's state is a wait for memory.
uint32_t RadixTree::resident_blocks(const Run& run, PoolId pool) const {
  const std::span<const PageId> there = pages(run, pool);
  if (there.empty()) return 0;
  const Residency* in = find_residency(nodes_[run.node], pool);
  if (in->arriving == 0 && in->count == in->pages.size()) {
    return static_cast<uint32_t>(there.size());
  }
  const auto end = std::ranges::find_if(there, [&](PageId page) {
    return page == kNoPage || pools_[pool].state(page) != PageState::kResident;
  });
  return static_cast<uint32_t>(end - there.begin());
}

bool RadixTree::resident(Place at, PoolId pool) const {
  const PageId found = page(at, pool);
  return found != kNoPage && pools_[pool].state(found) == PageState::kResident;
}

bool RadixTree::holds_all(const Run& run, PoolId pool) const {
  const Residency* in = find_residency(nodes_[run.node], pool);
  return in && in->count == in->pages.size() && in->pages.size() >= run.offset + run.blocks;
}

bool RadixTree::anywhere(Place at) const {
  return std::ranges::any_of(nodes_[at.node].pools, [&](const Residency& in) {
    return at.offset < in.pages.size() && in.pages[at.offset] != kNoPage;
  });
}

bool RadixTree::resident_elsewhere(Place at, PoolId pool) const {
  return std::ranges::any_of(nodes_[at.node].pools, [&](const Residency& in) {
    return in.pool != pool && resident(at, in.pool);
  });
}

bool RadixTree::resident_below(Place at, PoolId pool) const {
  for (auto below = pools_[pool].shape.below; below; below = pools_[*below].shape.below) {
    if (resident(at, *below)) return true;
  }
  return false;
}

bool RadixTree::settled(Place at, PoolId pool) const {
  return pools_[pool][page(at, pool)].refused || resident_below(at, pool);
}

bool RadixTree::spent(Place at, PoolId pool) const {
  if (dead(at)) return true;
  const bool soft = pins.of(pool, nodes_[at.node].keys[at.offset]) == Pinned::kSoft;
  return settled(at, pool) && !soft;
}

Place RadixTree::owner(PoolId pool, PageId page) const {
  const Page& info = pools_[pool][page];
  return {info.node, info.block - nodes_[info.node].first};
}

void RadixTree::place(Place at, PoolId pool, PageId page) {
  place({at.node, at.offset, 1}, pool, {&page, 1});
}

void RadixTree::place(const Run& run, PoolId pool, std::span<const PageId> pages) {
  if (pages.empty()) return;
  Node& node = nodes_[run.node];
  for (uint32_t i = 0; i < run.blocks; ++i) holes -= !anywhere({run.node, run.offset + i});
  Residency& in = residency(node, pool);
  const bool had = in.any();
  if (in.pages.size() < run.offset + run.blocks) {
    in.pages.resize(run.offset + run.blocks, kNoPage);
  }
  for (uint32_t i = 0; i < run.blocks; ++i) {
    PageId& page = in.pages[run.offset + i];
    KVC2_CHECK(page == kNoPage, "I6: a block has pages %u and %u in pool %u", page, pages[i], pool);
    if (policy_.counts_pages()) {
      Use& use = node.uses[run.offset + i];
      const Use before = use;
      policy_.placed(pool, node.keys[run.offset + i], use);
      tell_marked({run.node, run.offset + i}, before);
    }
    page = pages[i];
    Page& info = pools_[pool][page];
    info.node = run.node;
    info.block = node.first + run.offset + i;
    in.arriving += pools_[pool].state(page) == PageState::kInFlight;
  }
  in.count += run.blocks;
  if (events.on()) {
    for (uint32_t i = 0; i < run.blocks; ++i) {
      if (resident({run.node, run.offset + i}, pool)) tell_stored({run.node, run.offset + i}, pool);
    }
  }
  forget_refusals(run, pool);
  count_pages(run.node, pool, run.blocks);
  if (!had) propagate(run.node, pool, +1);
}

// The pool has these blocks now, whoever refused them when.
void RadixTree::forget_refusals(const Run& run, PoolId pool) {
  for (const Residency& in : nodes_[run.node].pools) {
    if (pools_[in.pool].shape.below != pool) continue;
    for (const PageId page : pages(run, in.pool)) {
      if (page != kNoPage) pools_[in.pool][page].refused = 0;
    }
  }
}

void RadixTree::arrive(Place at, PoolId pool) {
  --find_residency(nodes_[at.node], pool)->arriving;
  tell_stored(at, pool);
}

PageId RadixTree::clear(Place at, PoolId pool) {
  Residency* in = find_residency(nodes_[at.node], pool);
  KVC2_CHECK(in && at.offset < in->pages.size() && in->pages[at.offset] != kNoPage,
             "no page of pool %u at node %u, %u", pool, at.node, at.offset);
  if (events.on() && resident(at, pool)) tell_removed(at, pool);
  const PageId page = in->pages[at.offset];
  in->pages[at.offset] = kNoPage;
  --in->count;
  count_pages(at.node, pool, -1);
  in->arriving -= pools_[pool].state(page) == PageState::kInFlight;
  if (policy_.counts_pages()) {
    const Node& node = nodes_[at.node];
    policy_.cleared(pool, node.keys[at.offset], node.uses[at.offset]);
  }
  while (!in->pages.empty() && in->pages.back() == kNoPage) in->pages.pop_back();
  if (!in->any()) {
    drop_residency(at.node, pool);
    propagate(at.node, pool, -1);
  }
  if (!anywhere(at)) ++holes;
  return page;
}

void RadixTree::replace(Place at, PoolId pool, PageId page) {
  find_residency(nodes_[at.node], pool)->pages[at.offset] = page;
  pools_[pool][page].node = at.node;
  pools_[pool][page].block = nodes_[at.node].first + at.offset;
  if (events.scan) tell_stored(at, pool);  // the scan may have passed the new page
}

// The subtree of `node` gained its first (+1) or lost its last (-1) page of a pool.
void RadixTree::propagate(NodeId node, PoolId pool, int change) {
  for (NodeId above = nodes_[node].parent; above != kNoNode; above = nodes_[above].parent) {
    Residency& in = residency(nodes_[above], pool);
    const bool had = in.any();
    in.children += static_cast<uint32_t>(change);
    const bool has = in.any();
    if (!has) drop_residency(above, pool);
    refresh(above);
    if (had == has) return;
  }
}

void RadixTree::mark_reused(const Run& run) {
  uint32_t& reused = nodes_[run.node].reused_blocks;
  reused = std::max(reused, run.offset + run.blocks);
}

bool RadixTree::reused(Place at) const { return at.offset < nodes_[at.node].reused_blocks; }

// An acquire that matches a block matches all blocks before it, so that no block is admitted
// without those before it.
bool RadixTree::admits(PoolId pool, Place at) const {
  return !pools_[pool].shape.second_access || reused(at);
}

uint8_t RadixTree::standing_of(Place at, PoolId pool) const {
  return static_cast<uint8_t>(find_residency(nodes_[at.node], pool)->rank >> 56);
}

uint8_t RadixTree::standing_in(PoolId pool, const BlockKey& key, const Life& life,
                               bool held_below) const {
  const Pinned pinned = pins.of(pool, key);
  if (pinned == Pinned::kHard) return kNeverRefused;
  const bool soft = pinned == Pinned::kSoft;
  return rank_standing(standing(life, soft, now_), held_below && !soft);
}

std::vector<uint32_t> RadixTree::asked(const Use* above, std::span<const BlockKey> keys,
                                       uint32_t stamp) {
  return policy_.asked(keys, above, stamp);
}

void RadixTree::expect(Place at, uint32_t mark) {
  Use& use = nodes_[at.node].uses[at.offset];
  const Use before = use;
  policy_.expected(use, mark);
  if (policy_.counts_pages()) tell_marked(at, before);
}

void RadixTree::touch(const Run& run, uint32_t stamp) {
  Node& node = nodes_[run.node];
  for (uint32_t i = run.offset; i < run.offset + run.blocks; ++i) {
    const Use before = node.uses[i];
    policy_.touched(node.keys[i], node.uses[i], stamp);
    if (policy_.counts_pages()) tell_marked({run.node, i}, before);
  }
  refresh(run.node);
}

// I3: a leaf of its pool; a last copy only if the block is a leaf of the union too. I4: no pins.
// I8: the dead are first. I10: blocks pinned hard do not go; those pinned soft go last, though a
// slower pool may hold a copy.
Rank RadixTree::rank_of(NodeId id, const Residency& in) const {
  if (in.count == 0 || in.children > 0) return kNotEvictable;
  const Node& node = nodes_[id];
  const Place at{id, static_cast<uint32_t>(in.pages.size()) - 1};
  const PagePool& pool = pools_[in.pool];
  const PageId page = in.pages.back();
  if (pool.state(page) != PageState::kResident || pool[page].pins > 0) return kNotEvictable;
  const bool held_below = resident_below(at, in.pool);
  if (!last(at) && !held_below && !resident_elsewhere(at, in.pool)) return kNotEvictable;
  const bool settled = held_below || pool[page].refused;
  const Queued queued = policy_.queued(node.uses[at.offset]);
  if (dead(at)) return rank_in(rank_standing(kDead, settled), queued);
  const Pinned pinned = pins.of(in.pool, node.keys[at.offset]);
  if (pinned == Pinned::kHard) return kNotEvictable;
  const bool soft = pinned == Pinned::kSoft;
  const uint8_t stands = standing(life(at), soft, now_);
  return rank_in(rank_standing(stands, settled && !soft), queued);
}

void RadixTree::refresh(NodeId node) {
  for (Residency& in : nodes_[node].pools) set_rank(node, in, rank_of(node, in));
}

// Where the block's mark has changed, the policy hears of each page: the mark says their queue.
void RadixTree::tell_marked(Place at, const Use& before) {
  const Node& node = nodes_[at.node];
  if (node.uses[at.offset].mark == before.mark) return;
  for (const Residency& in : node.pools) {
    if (page(at, in.pool) != kNoPage) policy_.marked(in.pool, before, node.uses[at.offset]);
  }
}

Quota* RadixTree::quota(NodeId node, PoolId pool) {
  if (quotas.empty()) return nullptr;
  return quotas.find(spaces[nodes_[node].space].tenant, pools_[pool].shape.tier);
}

void RadixTree::count_pages(NodeId node, PoolId pool, int64_t pages) {
  Quota* of = quota(node, pool);
  if (!of) return;
  of->blocks += static_cast<uint64_t>(pages);
  of->bytes += static_cast<uint64_t>(pages) * pools_[pool].shape.page_bytes;
}

void RadixTree::set_tenant(uint32_t space, TenantId tenant) {
  spaces[space].tenant = tenant;
  std::vector<NodeId> nodes{spaces[space].root};
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (const Residency& in : nodes_[nodes[i]].pools) {
      if (!quota(nodes[i], in.pool)) continue;
      count_pages(nodes[i], in.pool, in.count);
      tenant_orders_[{in.pool, tenant}].move(nodes[i], kNotEvictable, in.rank);
    }
    for (NodeId c = nodes_[nodes[i]].first_child; c != kNoNode; c = nodes_[c].next) {
      nodes.push_back(c);
    }
  }
}

void RadixTree::forget_tenants(PoolId pool) {
  std::erase_if(tenant_orders_, [&](const auto& each) { return each.first.first == pool; });
}

std::optional<Place> RadixTree::coldest(PoolId pool) { return coldest(pool, order(pool)); }

std::optional<Place> RadixTree::coldest_of(TenantId tenant, PoolId pool) {
  const auto found = tenant_orders_.find({pool, tenant});
  return found == tenant_orders_.end() ? std::nullopt : coldest(pool, found->second);
}

std::optional<Place> RadixTree::coldest(PoolId pool, const EvictionOrder& order) {
  while (const auto victim = policy_.choose(pool, order)) {
    const Place at = *evictable(victim->node, pool);
    Use& use = nodes_[at.node].uses[at.offset];
    const Use before = use;
    if (!policy_.spares(pool, use)) return at;
    tell_marked(at, before);
    refresh(at.node);
  }
  return std::nullopt;
}

std::optional<Place> RadixTree::oldest(PoolId pool) const {
  std::optional<EvictionOrder::Entry> found;
  for (uint32_t queue = 0; pool < orders_.size() && queue < policy_.queues(); ++queue) {
    const auto entry = orders_[pool].oldest(queue);
    if (entry && (!found || entry->stamp() < found->stamp())) found = entry;
  }
  return found ? evictable(found->node, pool) : std::nullopt;
}

std::optional<Place> RadixTree::evictable(NodeId node, PoolId pool) const {
  const Residency* in = find_residency(nodes_[node], pool);
  if (!in || in->rank == kNotEvictable) return std::nullopt;
  return Place{node, static_cast<uint32_t>(in->pages.size()) - 1};
}

// When the 32-bit clock is about to overflow. Stamps that differed may be equal then; their order
// stays.
void RadixTree::halve_stamps() {
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    for (Use& use : nodes_[id].uses) policy_.halve(use);
    refresh(id);
  }
  policy_.halved();
}

}  // namespace kvc2
