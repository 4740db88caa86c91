// Index: what ends the life of blocks before eviction does, and what keeps blocks from eviction.
#include "index/index.h"

namespace kvc2 {

uint32_t Index::retire(uint32_t space) {
  const Lock lock(mutex_);
  if (open_space(space).retired) return 0;
  tree_.spaces[space].retired_at = tree_.now();
  tree_.pins.forget_space(space);
  return tree_.retire(space);
}

uint32_t Index::advance(uint32_t now) {
  const Lock lock(mutex_);
  return tree_.advance(now);
}

void Index::expire_by(uint32_t space, uint32_t second) {
  const Lock lock(mutex_);
  open_space(space);
  if (second == 0) throw std::invalid_argument("second: 1 or later");
  tree_.expire_by(space, second);
}

// Two words a page: when its block expires, and the lower half of the page's generation.
std::vector<uint32_t> Index::lifetimes(PoolId id) const {
  std::vector<uint32_t> found;
  in_slices(id, [&] {
    const PagePool& of = pools_.at(id);
    const auto page = static_cast<PageId>(found.size() / 2);
    if (page == of.size()) return false;
    const bool there = of.state(page) == PageState::kResident;
    found.push_back(there ? tree_.life(tree_.owner(id, page)).expires : 0);
    found.push_back(there && of.shape.durable ? static_cast<uint32_t>(of.generations[page]) : 0);
    return true;
  });
  return found;
}

Evicted Index::reap(PoolId id, uint32_t pages) {
  Evicted evicted;
  in_slices(id, [&] {
    const auto victim = evicted.pages.size() < pages ? tree_.coldest(id) : std::nullopt;
    if (!victim || !tree_.dead(*victim)) return false;
    evictor_.evict(*victim, id, evicted);
    return true;
  });
  return evicted;
}

std::vector<BlockKey> Index::path_keys(uint32_t space, const Content& prefix) const {
  const Space& of = tree_.spaces[space];
  if (prefix.tokens.size() < of.words) throw std::invalid_argument("tokens: less than a block");
  return chain_keys(root_key(of.name), prefix, of.words);
}

void Index::refresh_path(uint32_t space, const Content& prefix) {
  for (const Run& run : tree_.find(space, prefix)) tree_.refresh(run.node);
}

bool Index::pin(uint32_t space, PoolId id, const Content& prefix, const Keeping& as) {
  const Lock lock(mutex_);
  check_tokens(space, id);
  return pin_path(space, id, prefix, as);
}

bool Index::pin_path(uint32_t space, PoolId id, const Content& prefix, const Keeping& as) {
  std::vector<BlockKey> keys = path_keys(space, prefix);
  if (tree_.spaces[space].retired) return false;
  const Pinned how = as.hard ? Pinned::kHard : Pinned::kSoft;
  const uint32_t ends = seconds_later(tree_.now(), as.ttl);
  if (as.keep_stronger && tree_.pins.stronger(id, keys.back(), how, ends)) return true;
  const bool pinned = tree_.pins.pin(id, space, std::move(keys), how, as.max_blocks, ends);
  refresh_path(space, prefix);
  return pinned;
}

uint32_t Index::unpin(uint32_t space, PoolId id, const Content& prefix) {
  const Lock lock(mutex_);
  check_tokens(space, id);
  return unpin_path(space, id, prefix);
}

uint32_t Index::unpin_path(uint32_t space, PoolId id, const Content& prefix) {
  const uint32_t blocks = tree_.pins.unpin(id, path_keys(space, prefix).back());
  refresh_path(space, prefix);
  return blocks;
}

bool Index::has_pins(uint32_t space) const {
  const Lock lock(mutex_);
  open_space(space);
  return tree_.pins.of_space(space);
}

uint32_t Index::pinned_blocks(PoolId id, bool hard, std::optional<TenantId> of) const {
  const Lock lock(mutex_);
  pools_.at(id);
  const Pinned how = hard ? Pinned::kHard : Pinned::kSoft;
  if (!of) return tree_.pins.blocks(id, how);
  uint32_t blocks = 0;
  for (uint32_t space = 0; space < tree_.spaces.size(); ++space) {
    if (tree_.spaces[space].tenant == *of) blocks += tree_.pins.blocks(id, how, space);
  }
  return blocks;
}

}  // namespace kvc2
