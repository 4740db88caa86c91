// Index: how the life of blocks ends before eviction comes to them.
#include "index/index.h"

namespace kvc2 {

uint32_t Index::retire(uint32_t space) {
  const Lock lock(mutex_);
  if (space >= tree_.spaces.size()) throw UnknownId("namespace " + std::to_string(space));
  if (tree_.spaces[space].retired) return 0;
  tree_.spaces[space].retired_at = tree_.now();
  return tree_.retire(space);
}

uint32_t Index::advance(uint32_t now) {
  const Lock lock(mutex_);
  return tree_.advance(now);
}

Evicted Index::reap(PoolId id, uint32_t pages) {
  Evicted evicted;
  in_slices(id, [&] {
    const auto victim = evicted.pages.size() < pages ? tree_.coldest(id) : std::nullopt;
    if (!victim || !tree_.dead(*victim)) return false;
    evict_at(*victim, id, evicted);
    return true;
  });
  return evicted;
}

}  // namespace kvc2
