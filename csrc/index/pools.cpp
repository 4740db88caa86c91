#include "index/pools.h"

#include "index/block_key.h"

namespace kvc2 {

PoolId Pools::add(const PagePool::Shape& shape) {
  if (shape.page_size == 0 || shape.page_size > kMaxPageSize) {
    throw std::invalid_argument("page_size: 1 to 512");
  }
  if (shape.pages_per_slab == 0 || shape.pages_per_slab >= kNoPage) {
    throw std::invalid_argument("pages_per_slab: at least 1");
  }
  if (shape.durable && shape.below) {
    throw std::invalid_argument("below: a durable pool is the last of its chain");
  }
  if (shape.below && at(*shape.below).shape.page_size != shape.page_size) {
    throw std::invalid_argument("page_size: not that of the pool below");
  }
  pools_.push_back(std::make_unique<PagePool>(shape));
  return size() - 1;
}

std::vector<PoolId> Pools::chain(PoolId head) const {
  std::vector<PoolId> pools{head};
  while (const auto below = at(pools.back()).shape.below) pools.push_back(*below);
  return pools;
}

bool Pools::is_above(PoolId above, PoolId pool) const {
  auto below = alive(above) ? pools_[above]->shape.below : std::nullopt;
  while (below && *below != pool) below = pools_[*below]->shape.below;
  return below.has_value();
}

}  // namespace kvc2
