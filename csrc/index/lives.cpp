// Index: how the life of blocks ends before eviction comes to them.
#include "index/index.h"

namespace kvc2 {

using Lock = std::lock_guard<std::mutex>;

uint32_t Index::retire(uint32_t space) {
  const Lock lock(mutex_);
  if (space >= tree_.spaces.size()) throw UnknownId("namespace " + std::to_string(space));
  if (tree_.spaces[space].retired) return 0;
  return tree_.retire(space);
}

Evicted Index::reap(PoolId id, uint32_t pages) {
  const Lock lock(mutex_);
  pool(id);
  Evicted evicted;
  while (evicted.pages.size() < pages) {
    const auto victim = tree_.coldest(id);
    if (!victim || !tree_.dead(*victim)) break;
    evict_at(*victim, id, evicted);
  }
  return evicted;
}

}  // namespace kvc2
