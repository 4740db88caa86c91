#include "index/key_leases.h"

#include <algorithm>
#include <map>
#include <unordered_set>

namespace kvc2 {

template <typename Map>
static auto& found_in(Map& leases, LeaseId id) {
  const auto found = leases.find(id);
  if (found == leases.end()) throw UnknownId("lease of keys " + std::to_string(id));
  return found->second;
}

KeyLeases::Lease& KeyLeases::get(LeaseId id) { return found_in(leases_, id); }

const KeyLeases::Lease& KeyLeases::get(LeaseId id) const { return found_in(leases_, id); }

std::optional<Place> KeyLeases::place_of(uint32_t space, const KeyBlock& key) const {
  const auto at = tree_.next({tree_.spaces[space].root, kBeforeFirst}, key);
  if (at && tree_.dead(*at)) return std::nullopt;
  return at;
}

static uint8_t tier_of(const RadixTree& tree, std::span<const PoolId> pools, Place at) {
  const auto holder = std::ranges::find_if(pools, [&](PoolId p) { return tree.resident(at, p); });
  return holder == pools.end() ? 0 : static_cast<uint8_t>(1 + (holder - pools.begin()));
}

uint8_t KeyLeases::find(uint32_t space, std::span<const PoolId> pools, const KeyBlock& key) const {
  const auto at = place_of(space, key);
  return at ? tier_of(tree_, pools, *at) : 0;
}

void KeyLeases::open(LeaseId id, const Request& request) {
  Lease lease{request.space,
              request.pools[0],
              request.stamp,
              request.hints,
              {request.keys.begin(), request.keys.end()},
              std::vector<uint8_t>(request.keys.size(), 0),
              std::vector<uint32_t>(request.keys.size(), 0),
              std::vector<PageId>(request.keys.size(), kNoPage)};
  for (size_t key = 0; key < lease.keys.size(); ++key) {
    const auto at = place_of(request.space, lease.keys[key]);
    lease.found[key] = at ? tier_of(tree_, request.pools, *at) : 0;
    if (request.touches) use(lease, key, at, request);
    if (lease.found[key] != 0 && tree_.page(*at, lease.pool) != kNoPage) hold(lease, key, *at);
  }
  leases_.emplace(id, std::move(lease));
}

// What is known of uses learns of this one: of a key that was found at this place, or was not.
void KeyLeases::use(Lease& lease, size_t key, std::optional<Place> at, const Request& request) {
  if (lease.found[key] == 0) {
    const BlockKey name = name_of(request.space, lease.keys[key]);
    const auto marks = tree_.asked(nullptr, {&name, 1}, request.stamp);
    if (!marks.empty()) lease.marks[key] = marks[0];
    return;
  }
  const Run run{at->node, at->offset, 1};
  tree_.touch(run, request.stamp);
  tree_.mark_reused(run);
  transfers_.requeue(run, request.pools);
  tree_.say(*at, request.hints.life(tree_.now()), kNoneFresh);
}

BlockKey KeyLeases::name_of(uint32_t space, const KeyBlock& key) const {
  return next_key(root_key(tree_.spaces[space].name), key);
}

std::vector<std::optional<Newcomer>> KeyLeases::newcomers(LeaseId id,
                                                          std::span<const KeyBlock> keys) const {
  const Lease& lease = get(id);
  std::map<KeyBlock, uint32_t> marks;
  for (size_t key = 0; key < lease.found.size(); ++key) {
    if (lease.found[key] == 0) marks.emplace(lease.keys[key], lease.marks[key]);
  }
  const Life life = lease.hints.life(tree_.now());
  std::vector<std::optional<Newcomer>> found;
  for (const KeyBlock& key : keys) {
    const auto mark = marks.find(key);
    if (mark == marks.end()) {
      found.emplace_back();
      continue;
    }
    const BlockKey name = name_of(lease.space, key);
    const auto there = tree_.next({tree_.spaces[lease.space].root, kBeforeFirst}, name);
    const bool below = there && tree_.resident_below(*there, lease.pool);
    found.push_back(Newcomer{.key = name,
                             .use = {lease.stamp, mark->second},
                             .standing = tree_.standing_in(lease.pool, name, life, below),
                             .tenant = tree_.spaces[lease.space].tenant});
  }
  return found;
}

void KeyLeases::insist(LeaseId id) {
  const Lease& lease = get(id);
  const std::vector<PoolId> pools = pools_.chain(lease.pool);
  for (const PageId page : lease.pages) {
    if (page != kNoPage) transfers_.insist(tree_.owner(lease.pool, page), pools);
  }
}

// The key's block is in the lease's pool, or on its way there.
void KeyLeases::hold(Lease& lease, size_t key, Place at) {
  lease.pages[key] = tree_.page(at, lease.pool);
  pools_.at(lease.pool).pin(lease.pages[key]);
  tree_.refresh(at.node);
}

KeyLeaseView KeyLeases::view(LeaseId id) const {
  const Lease& lease = get(id);
  const auto asked = static_cast<std::ptrdiff_t>(lease.found.size());
  KeyLeaseView view{id, lease.found, {lease.pages.begin(), lease.pages.begin() + asked}, {}, 0};
  for (const PageId page : view.pages) {
    const TransferId filling = page == kNoPage ? 0 : transfers_.into(lease.pool, page).value_or(0);
    view.arrived.push_back(page != kNoPage && filling == 0);
    view.transfer = std::max(view.transfer, filling);
  }
  return view;
}

std::optional<Transfer> KeyLeases::promote(LeaseId id, uint32_t max_pages) {
  Lease& lease = get(id);
  const auto below = pools_.at(lease.pool).shape.below;
  Transfers::Plan plan{.source = below.value_or(0), .target = lease.pool};
  for (size_t key = 0; key < lease.found.size(); ++key) {
    if (lease.pages[key] != kNoPage || lease.found[key] == 0) continue;
    const auto at = place_of(lease.space, lease.keys[key]);
    if (!at) continue;
    const bool there = tree_.page(*at, lease.pool) != kNoPage;
    if (!there && !(below && tree_.resident(*at, *below))) continue;
    if (!there && (plan.size() >= max_pages || !transfers_.add(plan, *at))) break;
    hold(lease, key, *at);
  }
  if (plan.empty()) return std::nullopt;
  return transfers_.start(std::move(plan));
}

Load KeyLeases::next_load(LeaseId id, uint32_t max_pages) {
  const Lease& lease = get(id);
  const std::vector<PoolId> pools = pools_.chain(lease.pool);
  // Where the pool above the durable one is the lease's own, promote brings from the durable one.
  if (pools.size() < 3 || !pools_.at(pools.back()).shape.durable) return {};
  std::vector<KeyBlock> wanted;
  for (size_t key = 0; key < lease.found.size(); ++key) {
    if (lease.pages[key] != kNoPage || lease.found[key] == 0) continue;
    const auto at = place_of(lease.space, lease.keys[key]);
    if (at && tree_.page(*at, lease.pool) == kNoPage) wanted.push_back(lease.keys[key]);
  }
  return prefetch(lease.space, std::span(pools).subspan(pools.size() - 2), wanted, max_pages,
                  false);
}

Load KeyLeases::prefetch(uint32_t space, std::span<const PoolId> pools,
                         std::span<const KeyBlock> keys, uint32_t max_pages, bool judged) {
  max_pages = std::min(max_pages, Transfers::kPagesMax);
  Transfers::Plan plan{};
  std::optional<TransferId> coming;
  for (const KeyBlock& key : keys) {
    const auto at = place_of(space, key);
    if (!at) continue;
    const uint8_t tier = tier_of(tree_, pools, *at);
    const bool near = tier < 2 || tree_.page(*at, pools[0]) != kNoPage;
    const PoolId target = near ? pools[0] : pools[tier - 2];
    if (const PageId page = tree_.page(*at, target); page != kNoPage) {
      if (plan.empty() && !coming) coming = transfers_.into(target, page);
      continue;
    }
    if (near || pools_.at(target).closed) continue;
    const PoolId source = pools[tier - 1];
    if (plan.empty()) plan = {.source = source, .target = target};
    if (plan.source != source) continue;
    if (plan.size() >= max_pages) break;
    if (!(judged ? transfers_.offer(plan, *at) : transfers_.add(plan, *at))) break;
  }
  if (!plan.empty()) return transfers_.start(std::move(plan));
  if (coming) return Wait{*coming};
  return {};
}

std::vector<CommitResult> KeyLeases::commit(Commit asked, std::optional<LeaseId> id) {
  Lease* const lease = id ? &get(*id) : nullptr;
  if (lease && (lease->space != asked.space || lease->pool != asked.pool)) {
    throw std::invalid_argument("lease: of another namespace or pool");
  }
  if (lease) {
    asked.stamp = lease->stamp;
    asked.hints = lease->hints;
  }
  std::vector<CommitResult> results(asked.keys.size(), CommitResult::kRefused);
  if (tree_.spaces[asked.space].retired) return results;
  for (size_t i = 0; i < results.size(); ++i) {
    // What was private until now is in no lease: only for a call that comes again all are searched.
    const bool again = !pools_.at(asked.pool).is(asked.pages[i], PageState::kPrivate);
    results[i] = commit_one(asked, i);
    if (!lease || results[i] != CommitResult::kAdopted) continue;
    if (again && std::ranges::find(lease->pages, asked.pages[i]) != lease->pages.end()) continue;
    lease->keys.push_back(asked.keys[i]);
    lease->pages.push_back(kNoPage);
    hold(*lease, lease->pages.size() - 1, tree_.owner(asked.pool, asked.pages[i]));
  }
  return results;
}

// A call that comes again finds the page with its block.
CommitResult KeyLeases::commit_one(const Commit& asked, size_t i) {
  PagePool& into = pools_.at(asked.pool);
  const PageId page = asked.pages[i];
  const Place root{tree_.spaces[asked.space].root, kBeforeFirst};
  const auto known = tree_.next(root, asked.keys[i]);
  if (known && page != kNoPage && tree_.page(*known, asked.pool) == page) {
    return CommitResult::kAdopted;
  }
  if (!into.is(page, PageState::kPrivate) || into[page].held) return CommitResult::kRefused;
  const auto at = tree_.insert(root, asked.keys[i], asked.stamp);
  if (!at) return CommitResult::kRefused;
  if (tree_[at->node].uses[at->offset].stamp < asked.stamp) {
    tree_.touch({at->node, at->offset, 1}, asked.stamp);
  }
  const bool there = tree_.page(*at, asked.pool) != kNoPage;
  if (!there) {
    into.move(page, PageState::kResident);
    tree_.place(*at, asked.pool, page);
    into.enqueue(page);
  }
  tree_.say(*at, asked.hints.life(tree_.now()), known ? kNoneFresh : 0);
  tree_.refresh(at->node);
  return there ? CommitResult::kDuplicate : CommitResult::kAdopted;
}

void KeyLeases::release(LeaseId id, const Hints& hints) {
  Lease& lease = get(id);
  if (hints != Hints{}) lease.hints = hints;
  for (const PageId page : lease.pages) {
    if (page == kNoPage) continue;
    const Place at = tree_.owner(lease.pool, page);
    tree_.say(at, lease.hints.life(tree_.now()), kNoneFresh);
    if (lease.hints.session_end) tree_.end_tail(at, lease.stamp);
  }
  close(id);
}

bool KeyLeases::close(LeaseId id) {
  const auto found = leases_.find(id);
  if (found == leases_.end()) return false;
  PagePool& from = pools_.at(found->second.pool);
  for (const PageId page : found->second.pages) {
    if (page == kNoPage) continue;
    from.unpin(page);
    tree_.refresh(from[page].node);
  }
  leases_.erase(found);
  return true;
}

void KeyLeases::lose(PoolId id, std::span<const PageId> pages) {
  if (pages.empty()) return;
  const std::unordered_set<PageId> failed(pages.begin(), pages.end());
  for (auto& [lease_id, lease] : leases_) {
    if (lease.pool != id) continue;
    for (PageId& page : lease.pages) {
      if (page == kNoPage || !failed.contains(page)) continue;
      pools_.at(id).unpin(page);
      page = kNoPage;
    }
  }
}

uint32_t KeyLeases::held_in(LeaseId id, PoolId of) const {
  const Lease& lease = get(id);
  return static_cast<uint32_t>(std::ranges::count_if(lease.pages, [&](PageId page) {
    return page != kNoPage && tree_.resident(tree_.owner(lease.pool, page), of);
  }));
}

std::vector<LeaseId> KeyLeases::in_pool(PoolId pool) const {
  std::vector<LeaseId> found;
  for (const auto& [id, lease] : leases_) {
    if (lease.pool == pool) found.push_back(id);
  }
  return found;
}

bool KeyLeases::use_space(uint32_t space) const {
  return std::ranges::any_of(leases_, [&](const auto& each) { return each.second.space == space; });
}

void KeyLeases::halve_stamps() {
  for (auto& [id, lease] : leases_) lease.stamp /= 2;
}

}  // namespace kvc2
