// Index: rebuild a durable pool's residency from its catalogue, which has no order. A record counts
// only if its digest follows from its parent's and its tokens, so that a damaged or foreign record
// is a miss for itself and for what hangs on it.
#include <deque>

#include "index/index.h"

namespace kvc2 {

// What records can hang on: namespaces, and blocks that the pool holds already. A block is known by
// its page, since a split moves its place.
std::deque<Index::Known> Index::known_parents(PoolId id) {
  std::deque<Known> known;
  const PagePool& of = pools_.at(id);
  for (const Space& space : tree_.spaces) {
    if (space.closed || space.page_size != of.shape.page_size || space.retired) continue;
    known.push_back({space.name, kNoPage, space.root});
  }
  for (PageId page = 0; page < of.size(); ++page) {
    if (of.state(page) != PageState::kResident) continue;
    known.push_back({tree_.digest(tree_.owner(id, page)), page, kNoNode});
  }
  return known;
}

// What names a record's block: its tokens, or, in `room`, what stands for its key; and its extras.
static Block block_of(const RestoreBatch& batch, size_t i, size_t page_size, KeyBlock& room) {
  const bool any = !batch.extras.empty() && batch.extras[i] != Digest{};
  const Digest* extras = any ? &batch.extras[i] : nullptr;
  const uint8_t bytes = batch.external_bytes.empty() ? 0 : batch.external_bytes[i];
  if (bytes == 0) return {batch.tokens.subspan(i * page_size, page_size), extras};
  room = key_block(std::span(batch.external_keys[i]).first(bytes));
  return {room, extras};
}

// A key's block hangs on the root of an opaque namespace, without extras, and nothing else does.
bool Index::may_hang(const RestoreBatch& batch, size_t i, Place parent) const {
  const bool opaque = tree_.spaces[tree_[parent.node].space].opaque;
  const bool of_key = !batch.external_bytes.empty() && batch.external_bytes[i] > 0;
  const bool has_extras = !batch.extras.empty() && batch.extras[i] != Digest{};
  return opaque == of_key && (!opaque || (parent.offset == kBeforeFirst && !has_extras));
}

RestoreResult Index::restore_one(PoolId id, const RestoreBatch& batch, size_t i, Place parent) {
  PagePool& into = pools_.at(id);
  const size_t size = into.shape.page_size;
  const PageId page = batch.pages[i];
  if (!into.is(page, PageState::kFree)) return RestoreResult::kConflict;
  KeyBlock room;
  const auto block = tree_.insert(parent, block_of(batch, i, size, room), batch.stamps[i], true);
  if (!block) return RestoreResult::kConflict;
  const Place at = *block;
  if (tree_.page(at, id) != kNoPage) return RestoreResult::kConflict;
  if (tree_[at.node].uses[at.offset].stamp < batch.stamps[i]) {
    tree_.touch({at.node, at.offset, 1}, batch.stamps[i]);
  }
  into.take(page, PageState::kResident);
  into.generations[page] = batch.generations[i];
  transfers_.rise_above(batch.generations[i]);
  stamp_ = std::max(stamp_, batch.stamps[i]);
  tree_.place(at, id, page);
  tree_.refresh(at.node);
  const Life life{.expires = batch.expires.empty() ? 0 : batch.expires[i]};
  tree_.say(at, life, tree_[at.node].first + at.offset);
  return RestoreResult::kRestored;
}

std::vector<RestoreResult> Index::restore(PoolId id, const RestoreBatch& batch) {
  const Lock lock(mutex_);
  if (!pools_.at(id).shape.durable) throw std::invalid_argument("pool: not a durable one");
  const size_t size = pools_.at(id).shape.page_size;
  const size_t count = batch.digests.size();
  std::vector<RestoreResult> results(count, RestoreResult::kOrphan);
  std::unordered_map<Digest, std::vector<size_t>, NameHash> children;
  for (size_t i = 0; i < count; ++i) {
    KeyBlock room;
    const Block block = block_of(batch, i, size, room);
    if (next_digest(batch.parents[i], block) != batch.digests[i]) {
      results[i] = RestoreResult::kForged;
    } else {
      children[batch.parents[i]].push_back(i);
    }
  }
  // From each parent that is there down to what hangs on it, breadth first.
  std::deque<Known> known = known_parents(id);
  for (; !known.empty(); known.pop_front()) {
    const Known parent = known.front();
    const auto hanging = children.extract(parent.digest);
    if (hanging.empty()) continue;
    for (const size_t i : hanging.mapped()) {
      const bool root = parent.page == kNoPage;
      const Place at = root ? Place{parent.root, kBeforeFirst} : tree_.owner(id, parent.page);
      if (!may_hang(batch, i, at)) continue;
      results[i] = restore_one(id, batch, i, at);
      if (results[i] != RestoreResult::kRestored) continue;
      known.push_back({batch.digests[i], batch.pages[i], kNoNode});
    }
  }
  return results;
}

Residents Index::residents(PoolId id, PageId first, uint32_t count) {
  Residents found;
  PageId page = first;
  in_slices(id, [&] {
    const PagePool& of = pools_.at(id);
    if (!of.shape.durable) throw std::invalid_argument("pool: not a durable one");
    if (page >= of.size() || page - first >= count) return false;
    if (of.is(page, PageState::kResident)) {
      found.pages.push_back(page);
      found.records.append(tree_, tree_.owner(id, page), of.generations[page]);
    }
    ++page;
    return true;
  });
  return found;
}

}  // namespace kvc2
