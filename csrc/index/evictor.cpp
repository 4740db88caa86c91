#include "index/evictor.h"

namespace kvc2 {

std::optional<PageId> Evictor::allocate(PoolId id, PageState to, TenantId tenant, uint32_t taken) {
  PagePool& from = pools_.at(id);
  while (true) {  // what is evicted from a closed slab leaves no free page
    if (const auto page = from.allocate(to)) return page;
    const auto victim = from.shape.durable ? std::nullopt : victim_for(id, tenant, taken);
    if (!victim) return std::nullopt;
    count_eviction(*victim, id);
    drop(*victim, id, Cause::kEvicted);
  }
}

Given Evictor::offer(PoolId id, PageState to, const Newcomer& block, uint32_t taken,
                     uint32_t ahead) {
  const PagePool& into = pools_.at(id);
  const bool full = into.counts().free <= (into.shape.durable ? ahead : 0);
  if (admits_ && full) {
    const auto victim = victim_for(id, block.tenant, taken);
    if (const auto worths = victim ? refuses(id, block, *victim) : std::nullopt) {
      return {.refused = worths};
    }
  }
  return {.page = allocate(id, to, block.tenant, taken)};
}

std::optional<Worths> Evictor::worths(const Newcomer& block, Place victim) const {
  if (!admits_) return std::nullopt;
  const auto newcomer = policy_.worth(block.use);
  const auto there = policy_.worth(tree_[victim.node].uses[victim.offset]);
  return newcomer && there ? std::optional(Worths{*newcomer, *there}) : std::nullopt;
}

// A tenant that is over its quota gives way, whatever its blocks are worth (I11).
std::optional<Worths> Evictor::refuses(PoolId id, const Newcomer& block, Place victim) const {
  const auto found = worths(block, victim);
  if (!found) return std::nullopt;
  const TenantId tenant = tree_.spaces[tree_[victim.node].space].tenant;
  const Quota* quota = tree_.quotas.find(tenant, pools_.at(id).shape.tier);
  if (quota && quota->over() && tenant != block.tenant) return std::nullopt;
  const uint8_t standing = tree_.standing_of(victim, id);
  const float margin = pools_.at(id).shape.durable ? kDurableMargin : 1;
  const bool less = block.standing != standing ? block.standing < standing
                                               : found->newcomer < margin * found->victim;
  return less ? found : std::nullopt;
}

bool Evictor::could_evict_only(Place block, PoolId id, TenantId tenant) {
  if (tree_.evictable(block.node, id) != block) return false;  // as a rule: it has just come
  if (victim_for(id, tenant) != block) return false;
  const PageId page = tree_.page(block, id);
  pools_.at(id).pin(page);
  tree_.refresh(block.node);
  const bool only = !victim_for(id, tenant);
  pools_.at(id).unpin(page);
  tree_.refresh(block.node);
  return only;
}

void Evictor::note_refusal(PoolId id, const BlockKey& key, const Worths& worths) {
  pools_.at(id).count_refusals(1);
  policy_.refused(pools_.at(id).shape.tier, key);
  obituaries_.record({.key = key,
                      .when = tree_.now(),
                      .pool = id,
                      .cause = static_cast<uint32_t>(Cause::kNotAdmitted),
                      .worths = worths});
}

Worths Evictor::worths_of(const BlockKey& key) const {
  const auto known = obituaries_.find(key);
  return known ? known->worths : Worths{};
}

// Tenants over their quota pay first, then the tenant that asks, if its quota has no room left.
std::optional<Place> Evictor::victim_for(PoolId id, TenantId tenant, uint32_t taken) {
  if (const auto victim = victim_over_quota(id)) return victim;
  const PagePool::Shape& shape = pools_.at(id).shape;
  const Quota* own = tree_.quotas.find(tenant, shape.tier);
  if (own && own->full(uint64_t{taken} + 1, shape.page_bytes)) {
    if (const auto victim = tree_.coldest_of(tenant, id)) return victim;
  }
  return tree_.coldest(id);
}

std::optional<Place> Evictor::victim_over_quota(PoolId id) {
  for (const TenantId tenant : tree_.quotas.over(pools_.at(id).shape.tier)) {
    if (const auto victim = tree_.coldest_of(tenant, id)) return victim;
  }
  return std::nullopt;
}

void Evictor::evict(Place at, PoolId id, Evicted& evicted) {
  count_eviction(at, id);
  take(at, id, evicted, Cause::kEvicted);
}

void Evictor::take(Place at, PoolId id, Evicted& taken, Cause cause) {
  taken.pages.push_back(tree_.page(at, id));
  if (pools_.at(id).shape.durable) taken.digests.push_back(tree_.digest(at));
  if (!tree_.resident_elsewhere(at, id)) ++taken.last_copies;
  drop(at, id, cause);
}

void Evictor::drop(Place at, PoolId id, Cause cause) {
  pools_.at(id).free(clear(at, id, cause));
  tree_.refresh(at.node);
  tree_.trim(at.node);
}

void Evictor::forget(Place at, PoolId id, Cause cause) {
  clear(at, id, cause);
  tree_.refresh(at.node);
  tree_.trim(at.node);
}

// The page that the block had in the pool; it is still to be freed.
PageId Evictor::clear(Place at, PoolId id, Cause cause) {
  const PageId page = tree_.clear(at, id);
  const bool goes = cause == Cause::kEvicted || cause == Cause::kSessionEnded;
  const bool noted = goes && pools_[id][page].refused && !tree_.dead(at);  // when it was refused
  if (!tree_.anywhere(at) && !noted) bury(at, id, cause);
  return page;
}

void Evictor::bury(Place at, PoolId last, Cause cause) {
  if (cause == Cause::kEvicted && tree_.dead(at)) cause = cause_of_end(tree_, at);
  obituaries_.record({.key = tree_[at.node].keys[at.offset],
                      .when = tree_.now(),
                      .pool = last,
                      .cause = static_cast<uint32_t>(cause)});
}

// A block that is evicted before the pool below has it is sent back to the pools above.
void Evictor::count_eviction(Place at, PoolId id) {
  pools_.at(id).count_eviction(!tree_.resident_elsewhere(at, id));
  const auto below = pools_.at(id).shape.below;
  if (!below || tree_.settled(at, id) || !tree_.admits(*below, at)) return;
  for (const Residency& in : tree_[at.node].pools) {
    if (pools_[in.pool].shape.below == id && tree_.resident(at, in.pool)) {
      pools_[in.pool].send_back(tree_.page(at, in.pool));
    }
  }
}

void Evictor::tell_size(PoolId id) {
  if (id >= told_pages_.size()) told_pages_.resize(id + 1, 0);
  const uint32_t pages = pools_.alive(id) ? pools_[id].counts().pages : 0;
  uint32_t& told = told_pages_[id];
  if (pages >= told / 2 && pages <= uint64_t{told} * 5 / 4) return;
  told = pages;
  policy_.resize(id, pages);
}

Cause cause_of_end(const RadixTree& tree, Place dead) {
  const bool retired = tree.spaces[tree[dead.node].space].retired;
  return retired ? Cause::kInvalidated : Cause::kExpired;
}

}  // namespace kvc2
