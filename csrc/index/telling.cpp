// The tree's fourth part: what it tells routers, as it happens and, by a scan, of what is there.
#include <algorithm>

#include "index/radix_tree.h"

namespace kvc2 {

KvBlock RadixTree::told_as(Place at) const {
  const Space& space = spaces[nodes_[at.node].space];
  const auto above = parent(at);
  return {.space = space.name,
          .page_size = space.page_size,
          .opaque = space.opaque,
          .key = nodes_[at.node].keys[at.offset],
          .parent = above ? nodes_[above->node].keys[above->offset] : BlockKey{},
          .block = block(at)};
}

// Another pool of this pool's tier has it. One that is leaving has nothing any more.
bool RadixTree::elsewhere_in_tier(Place at, PoolId pool) const {
  const uint8_t tier = pools_[pool].shape.tier;
  return std::ranges::any_of(nodes_[at.node].pools, [&](const Residency& in) {
    return in.pool != pool && pools_.alive(in.pool) && pools_[in.pool].shape.tier == tier &&
           resident(at, in.pool);
  });
}

void RadixTree::tell_stored(Place at, PoolId pool) {
  if (!events.on() || (!events.scan && elsewhere_in_tier(at, pool))) return;
  events.stored(told_as(at), pools_[pool].shape.tier);
}

void RadixTree::tell_removed(Place at, PoolId pool) {
  if (!events.on() || elsewhere_in_tier(at, pool)) return;
  events.removed(told_as(at), pools_[pool].shape.tier);
}

bool RadixTree::tell_some(uint32_t pages) {
  for (; events.scan && pages > 0; --pages) {
    const auto [pool, page] = std::pair(events.scan->pool, events.scan->page);
    if (pool >= pools_.size()) {
      events.scan.reset();
    } else if (!pools_.alive(pool) || page >= pools_[pool].size()) {
      events.scan->page = 0;
      ++events.scan->pool;
    } else if (pools_[pool].is(page, PageState::kResident) && !tell_path(owner(pool, page), pool)) {
      break;
    } else {
      ++events.scan->page;
    }
  }
  return events.scan.has_value();
}

// The blocks of the path that the pool has and that were not told, first things first, as far as
// there is room: false where there are more.
bool RadixTree::tell_path(Place to, PoolId pool) {
  std::vector<Place> untold;
  for (std::optional<Place> at = to; at; at = parent(*at)) {
    if (!resident(*at, pool)) continue;
    if (events.scan->was_told(pool, page(*at, pool))) break;
    untold.push_back(*at);
  }
  for (; !untold.empty(); untold.pop_back()) {
    const KvBlock first = told_as(untold.back());
    if (!events.has_room(first)) return false;
    events.scan->tell(pool, page(untold.back(), pool));
    events.stored(first, pools_[pool].shape.tier);
  }
  return true;
}

}  // namespace kvc2
