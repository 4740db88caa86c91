// Lives of leases: open, shorten, commit, lose, release.
#include "index/leases.h"

#include <algorithm>
#include <iterator>
#include <unordered_set>
#include <utility>

namespace kvc2 {

template <typename Map>
static auto& found_in(Map& leases, LeaseId id) {
  const auto found = leases.find(id);
  if (found == leases.end()) throw UnknownId("lease " + std::to_string(id));
  return found->second;
}

Leases::Lease& Leases::get(LeaseId id) { return found_in(leases_, id); }

const Leases::Lease& Leases::get(LeaseId id) const { return found_in(leases_, id); }

LeaseView Leases::open(LeaseId id, const Request& request, Found&& found) {
  const size_t size = tree_.spaces[found.space].page_size;
  Lease lease{.space = found.space,
              .pool = request.pools[0],
              .stamp = request.stamp,
              .hints = request.hints,
              .matched = static_cast<uint32_t>(found.tiers.size()),
              .found = std::move(found.tiers),
              .told = !request.touches,
              .touches = request.touches};
  lease.first = std::min(request.skip, lease.matched);
  const Content& asked = request.content;
  const Tokens skipped = asked.tokens.first(lease.first * size);
  lease.skipped.assign(skipped.begin(), skipped.end());
  const auto matches = [&](const BlockExtras& each) { return each.block < lease.matched; };
  std::ranges::copy_if(asked.extras, std::back_inserter(lease.extras), matches);
  hold_leading(lease, found.path);
  lease.tokens_from = lease.end();
  const Tokens rest = asked.tokens.first(lease.matched * size).subspan(lease.tokens_from * size);
  lease.tokens.assign(rest.begin(), rest.end());
  if (request.touches) {
    use(lease, found, request);
  } else {
    for (const Run& run : found.path) tree_.refresh(run.node);  // their pages are pinned now
  }
  return view_of(id, leases_.emplace(id, std::move(lease)).first->second);
}

// What is known of uses learns of this one, and others see what the lease computes.
void Leases::use(Lease& lease, const Found& found, const Request& request) {
  for (const Run& run : found.path) {
    tree_.touch(run, lease.stamp);
    tree_.mark_reused(run);
    transfers_.requeue(run, request.pools);
  }
  if (found.last.offset != kBeforeFirst) {
    lease.above = tree_[found.last.node].uses[found.last.offset];
  }
  tree_.say(found.last, lease.hints.life(tree_.now()), kNoneFresh);
  register_computing(lease, keys_after(lease, found.path, request.content));
  learn(lease, found.path, request);
}

// Pins what the lease's pool has of the path, after the blocks to skip, without a gap. The caller
// refreshes the nodes.
void Leases::hold_leading(Lease& lease, const std::vector<Run>& path) {
  uint32_t skips = lease.first;
  for (Run run : path) {
    const uint32_t passed = std::min(skips, run.blocks);
    skips -= passed;
    run = {run.node, run.offset + passed, run.blocks - passed};
    if (hold(lease, run) < run.blocks) return;
  }
}

// Pins the pages that the lease's pool has of the run, up to the first gap; returns how many. The
// caller refreshes the node.
uint32_t Leases::hold(Lease& lease, const Run& run) {
  PagePool& from = pools_.at(lease.pool);
  uint32_t held = 0;
  for (const PageId page : tree_.pages(run, lease.pool)) {
    if (page == kNoPage) break;
    from.pin(page);
    if (const auto transfer = transfers_.into(lease.pool, page)) lease.depends.push_back(*transfer);
    lease.held.push_back({page, page, lease.found[lease.end()]});
    ++held;
  }
  return held;
}

// The policy learns of what was not found, once. No acquire waits for it: it is told when somebody
// wants to know what these blocks are worth, or has them, or when the lease ends.
void Leases::tell_asked(Lease& lease) {
  if (lease.told) return;
  lease.told = true;
  const Use* above = lease.above ? &*lease.above : nullptr;
  lease.marks = tree_.asked(above, lease.unmatched, lease.stamp);
}

// The curve learns what was asked for, found or not.
void Leases::learn(const Lease& lease, const std::vector<Run>& path, const Request& request) {
  std::vector<BlockKey> keys;
  keys.reserve(request.blocks);
  for (const Run& run : path) {
    const auto from = tree_[run.node].keys.begin() + run.offset;
    keys.insert(keys.end(), from, from + run.blocks);
  }
  const size_t rest = std::min(request.blocks - keys.size(), lease.unmatched.size());
  keys.insert(keys.end(), lease.unmatched.begin(), lease.unmatched.begin() + rest);
  curve_.access(keys, tree_.spaces[lease.space].page_size, request.content.tokens.size());
}

// The keys of the prompt's full blocks after those of the path.
std::vector<BlockKey> Leases::keys_after(const Lease& lease, const std::vector<Run>& path,
                                         const Content& content) const {
  const Space& space = tree_.spaces[lease.space];
  BlockKey key = root_key(space.name);
  if (!path.empty())
    key = tree_[path.back().node].keys[path.back().offset + path.back().blocks - 1];
  return chain_keys(key, content.after(lease.matched, space.page_size), space.page_size);
}

// From now on the lease computes the blocks with these keys, which follow `matched`.
void Leases::register_computing(Lease& lease, std::vector<BlockKey>&& keys) {
  lease.unmatched = std::move(keys);
  lease.computing_from = 0;
  lease.computing = 0;
  bool leading = true;
  for (const BlockKey& block : lease.unmatched) {
    const uint32_t others = computing_.get(block);
    leading = leading && others != KeyTable::kAbsent;
    lease.computing += leading;
    computing_.put(block, others == KeyTable::kAbsent ? 1 : others + 1);
  }
}

// The lease computes the blocks before `end` no longer.
void Leases::unregister_computing(Lease& lease, uint32_t end) {
  while (lease.computing_from < lease.unmatched.size() &&
         lease.matched + lease.computing_from < end) {
    const BlockKey& block = lease.unmatched[lease.computing_from++];
    const uint32_t leases = computing_.get(block);
    if (leases == 1) {
      computing_.erase(block);
    } else {
      computing_.put(block, leases - 1);
    }
  }
}

LeaseView Leases::view_of(LeaseId id, const Lease& lease) const {
  const size_t tiers = pools_.chain(lease.pool).size();
  LeaseView view{.id = id,
                 .matched = lease.matched,
                 .first_block = lease.first,
                 .tiers = std::vector<uint32_t>(tiers, 0),
                 .computing = lease.computing};
  for (const Held& held : lease.held) {
    view.pages.push_back(held.page);
    if (held.tier != kComputed) ++view.tiers[held.tier];
  }
  for (size_t block = lease.end(); block < lease.matched; ++block) {
    if (view.ahead.empty() || view.ahead.back().tier != lease.found[block]) {
      view.ahead.push_back({lease.found[block], 0});
    }
    ++view.ahead.back().blocks;
  }
  for (const TransferId transfer : lease.depends) {
    if (transfers_.is_open(transfer)) view.transfer = std::max(view.transfer, transfer);
  }
  const auto filled = [&](const Held& held) {
    return transfers_.into(lease.pool, held.page).has_value();
  };
  const auto end = view.transfer == 0 ? lease.held.end() : std::ranges::find_if(lease.held, filled);
  view.arrived = static_cast<uint32_t>(end - lease.held.begin());
  return view;
}

LeaseView Leases::view(LeaseId id) const { return view_of(id, get(id)); }

void Leases::shorten(LeaseId id, uint32_t blocks) {
  Lease& lease = get(id);
  const uint32_t held = lease.end();
  const uint32_t end = std::max(held, blocks);
  const auto computed = [](const Held& each) { return each.tier == kComputed; };
  if (end >= lease.matched || held < lease.tokens_from ||
      std::ranges::any_of(lease.held, computed) || std::ranges::any_of(lease.stray, computed)) {
    return;
  }
  const Space& space = tree_.spaces[lease.space];
  const Content after = lease.content().after(held - lease.tokens_from, space.page_size);
  std::vector<BlockKey> keys = chain_keys(last_key(lease), after, space.page_size);
  keys.erase(keys.begin(), keys.begin() + (end - held));
  keys.insert(keys.end(), lease.unmatched.begin(), lease.unmatched.end());
  unregister_computing(lease, kEveryBlock);
  tell_asked(lease);
  std::vector<uint32_t> marks = marks_of(lease, end);
  lease.marks.insert(lease.marks.begin(), marks.begin(), marks.end());
  lease.matched = end;
  lease.found.resize(end);
  lease.tokens.resize(size_t{end - lease.tokens_from} * space.page_size);
  register_computing(lease, std::move(keys));
}

// Of the matched blocks from `from` on, those of blocks that have gone like those before them.
std::vector<uint32_t> Leases::marks_of(const Lease& lease, uint32_t from) const {
  std::vector<uint32_t> marks;
  auto at = cursor(lease);
  for (uint32_t block = lease.end(); block < lease.matched; ++block) {
    if (at) at = step(lease, *at, block);
    const uint32_t before = marks.empty() ? 0 : marks.back();
    marks.push_back(at ? tree_[at->node].uses[at->offset].mark : before);
  }
  marks.erase(marks.begin(), marks.begin() + (from - lease.end()));
  return marks;
}

std::vector<std::optional<Newcomer>> Leases::newcomers(LeaseId id, uint32_t block,
                                                       uint32_t blocks) {
  Lease& lease = get(id);
  tell_asked(lease);
  const Life life = lease.hints.life(tree_.now());
  const uint64_t end =
      std::min<uint64_t>(uint64_t{block} + blocks, uint64_t{lease.matched} + lease.marks.size());
  std::vector<std::optional<Newcomer>> found;
  auto at = cursor(lease);
  uint32_t after = lease.end();  // the block that follows `at`
  for (; block < end; ++block) {
    if (block < lease.matched) {
      found.emplace_back();
      continue;
    }
    for (; at && after <= block; ++after) at = follow(lease, *at, after);
    const auto there =
        block < lease.end() ? tree_.owner(lease.pool, lease.held[block - lease.first].anchor) : at;
    const BlockKey& key = lease.unmatched[block - lease.matched];
    const bool below = there && tree_.resident_below(*there, lease.pool);
    found.push_back(Newcomer{.key = key,
                             .use = {lease.stamp, lease.marks[block - lease.matched]},
                             .standing = tree_.standing_in(lease.pool, key, life, below),
                             .tenant = tree_.spaces[lease.space].tenant});
  }
  return found;
}

// A block that is new to the tree is the one that the policy was asked about, if its key is.
void Leases::expect(const Lease& lease, uint32_t block, Place at) {
  const uint32_t i = block - lease.matched;
  if (block < lease.matched || i >= lease.marks.size()) return;
  if (tree_[at.node].keys[at.offset] == lease.unmatched[i]) tree_.expect(at, lease.marks[i]);
}

void Leases::insist(LeaseId id) {
  const Lease& lease = get(id);
  const std::vector<PoolId> pools = pools_.chain(lease.pool);
  for (const Held& held : lease.held) {
    transfers_.insist(tree_.owner(lease.pool, held.anchor), pools);
  }
}

// The last block that the lease holds or skips; none if it holds none, and that has left the tree.
std::optional<Place> Leases::cursor(const Lease& lease) const {
  if (!lease.held.empty()) return tree_.owner(lease.pool, lease.held.back().anchor);
  if (lease.first == 0) return Place{tree_.spaces[lease.space].root, kBeforeFirst};
  uint32_t blocks = 0;
  const std::vector<Run> path = tree_.find(lease.space, lease.skipped_content());
  for (const Run& run : path) blocks += run.blocks;
  if (blocks < lease.first) return std::nullopt;
  return Place{path.back().node, path.back().offset + path.back().blocks - 1};
}

// Of the block of the cursor.
BlockKey Leases::last_key(const Lease& lease) const {
  const Space& space = tree_.spaces[lease.space];
  if (!lease.held.empty()) {
    const Place at = tree_.owner(lease.pool, lease.held.back().anchor);
    return tree_[at.node].keys[at.offset];
  }
  if (lease.first == 0) return root_key(space.name);
  return chain_keys(root_key(space.name), lease.skipped_content(), space.page_size).back();
}

// The lease's `block`, which follows `at`; none if acquire did not match it, if it has left the
// tree, or if it is dead.
std::optional<Place> Leases::step(const Lease& lease, Place at, uint32_t block) const {
  if (block >= lease.matched) return std::nullopt;
  const auto next = follow(lease, at, block);
  if (next && tree_.dead(*next)) return std::nullopt;
  return next;
}

// The same of any block that acquire asked for, dead or not.
std::optional<Place> Leases::follow(const Lease& lease, Place at, uint32_t block) const {
  if (block >= lease.matched) return tree_.next(at, lease.unmatched[block - lease.matched]);
  if (block < lease.tokens_from) return std::nullopt;
  const size_t size = tree_.spaces[lease.space].page_size;
  return tree_.next(at, lease.content().block(block - lease.tokens_from, size));
}

void Leases::commit(LeaseId id, const Content& blocks, std::span<const PageId> pages,
                    std::span<CommitResult> results) {
  Lease& lease = get(id);
  const size_t size = tree_.spaces[lease.space].page_size;
  const auto last = cursor(lease);
  if (tree_.spaces[lease.space].retired || !last) return;
  tell_asked(lease);
  const size_t before = lease.end();
  Place at = *last;
  const uint32_t known = tree_.blocks;
  uint32_t fresh = kNoneFresh;  // the first block that is new to the tree
  for (size_t i = 0; i < pages.size(); ++i) {
    const Block block = blocks.block(i, size);
    const uint64_t position = blocks.first + i;
    if (position < lease.first || position > lease.end()) break;
    results[i] = position < lease.end()
                     ? commit_again(lease, static_cast<uint32_t>(position), block, pages[i])
                     : commit_next(lease, at, block, pages[i]);
    if (results[i] == CommitResult::kRefused) break;
    if (fresh == kNoneFresh && tree_.blocks > known) fresh = static_cast<uint32_t>(position);
    if (lease.end() == position + 1 && tree_.last(at)) {  // the rest is in no tree
      const Tokens plain = blocks.until_extras(i + 1, size).subspan((i + 1) * size);
      const size_t most = std::min(pages.size() - i - 1, plain.size() / size);
      const uint32_t adopted = commit_rest(lease, at.node, plain, pages.subspan(i + 1, most));
      std::ranges::fill(results.subspan(i + 1, adopted), CommitResult::kAdopted);
      if (fresh == kNoneFresh) fresh = static_cast<uint32_t>(position) + 1;
      if (adopted < most) break;
      i += adopted;
      at = {at.node, tree_[at.node].blocks() - 1};
    }
  }
  learn_committed(lease, before);
  tree_.say(*cursor(lease), lease.hints.life(tree_.now()), fresh);
  unregister_computing(lease, lease.end());
}

// The curve learns the held blocks from `from` on that acquire had not asked for. Acquire asks for
// all blocks of a prompt but the last one, if the prompt ends with it.
void Leases::learn_committed(const Lease& lease, size_t from) {
  if (!lease.touches) return;
  const size_t asked = lease.matched + lease.unmatched.size();
  for (size_t block = std::max(from, asked - (asked > 0)); block < lease.end(); ++block) {
    const Place held = tree_.owner(lease.pool, lease.held[block - lease.first].anchor);
    curve_.add(tree_[held.node].keys[held.offset], tree_.spaces[lease.space].page_size);
  }
}

CommitResult Leases::commit_again(const Lease& lease, uint32_t position, const Block& block,
                                  PageId page) const {
  const Held& held = lease.held[position - lease.first];
  if (held.page != page) return CommitResult::kRefused;
  if (!tree_.is(tree_.owner(lease.pool, held.anchor), block)) return CommitResult::kRefused;
  return held.page == held.anchor ? CommitResult::kAdopted : CommitResult::kDuplicate;
}

// Commits the block after `at`, and moves `at` to that block.
CommitResult Leases::commit_next(Lease& lease, Place& at, const Block& block, PageId page) {
  PagePool& into = pools_.at(lease.pool);
  if (!into.is(page, PageState::kPrivate) || into[page].held) return CommitResult::kRefused;
  const auto inserted = tree_.insert(at, block, lease.stamp);
  if (!inserted) return CommitResult::kRefused;
  at = *inserted;
  if (tree_[at.node].uses[at.offset].stamp < lease.stamp) {
    tree_.touch({at.node, at.offset, 1}, lease.stamp);
  }
  expect(lease, lease.end(), at);
  const PageId there = tree_.page(at, lease.pool);
  if (there == kNoPage) {
    into.move(page, PageState::kResident);
    tree_.place(at, lease.pool, page);
    into.enqueue(page);
  } else {
    into[page].held = 1;
    if (const auto transfer = transfers_.into(lease.pool, there))
      lease.depends.push_back(*transfer);
  }
  const PageId anchor = there == kNoPage ? page : there;
  into.pin(anchor);
  lease.held.push_back({page, anchor, kComputed});
  tree_.refresh(at.node);
  return there == kNoPage ? CommitResult::kAdopted : CommitResult::kDuplicate;
}

// Commits blocks after the last one of `node`, on which nothing hangs, up to the first page that
// may not be committed; returns how many.
uint32_t Leases::commit_rest(Lease& lease, NodeId node, Tokens tokens,
                             std::span<const PageId> pages) {
  constexpr size_t kAhead = 16;  // page ids are in no order, so that each is a wait for memory
  PagePool& into = pools_.at(lease.pool);
  uint32_t adopted = 0;
  for (const PageId page : pages) {
    if (adopted + kAhead < pages.size()) into.prefetch(pages[adopted + kAhead]);
    if (!into.is(page, PageState::kPrivate) || into[page].held) break;
    into.move(page, PageState::kResident);
    into.enqueue(page);
    into.pin(page);
    lease.held.push_back({page, page, kComputed});
    ++adopted;
  }
  const size_t size = into.shape.page_size;
  const Run run = tree_.append(node, tokens.first(adopted * size), lease.stamp);
  for (uint32_t i = 0; i < adopted; ++i) {
    expect(lease, lease.end() - adopted + i, {run.node, run.offset + i});
  }
  tree_.place(run, lease.pool, pages.first(adopted));
  tree_.refresh(node);
  return adopted;
}

void Leases::release(LeaseId id, const Hints& hints) {
  Lease& lease = get(id);
  if (hints != Hints{}) lease.hints = hints;
  if (const auto at = cursor(lease)) {
    tree_.say(*at, lease.hints.life(tree_.now()), kNoneFresh);
    if (lease.hints.session_end) tree_.end_tail(*at, lease.stamp);
  }
  close(id);
}

bool Leases::close(LeaseId id) {
  const auto found = leases_.find(id);
  if (found == leases_.end()) return false;
  tell_asked(found->second);
  let_go(found->second.pool, found->second.held);
  let_go(found->second.pool, found->second.stray);
  unregister_computing(found->second, kEveryBlock);
  leases_.erase(found);
  return true;
}

void Leases::let_go(PoolId id, std::span<const Held> held) {
  PagePool& from = pools_.at(id);
  NodeId node = kNoNode;  // refreshed once for its run of pages
  for (const Held& each : held) {
    if (each.page != each.anchor) {
      from[each.page].held = 0;
      from.free(each.page);
    }
    if (each.anchor == kNoPage) continue;
    from.unpin(each.anchor);
    const NodeId owner = from[each.anchor].node;
    if (node != kNoNode && owner != node) tree_.refresh(node);
    node = owner;
  }
  if (node != kNoNode) tree_.refresh(node);
}

void Leases::lose(PoolId id, std::span<const PageId> pages) {
  if (pages.empty()) return;
  const std::unordered_set<PageId> failed(pages.begin(), pages.end());
  for (auto& [lease_id, lease] : leases_) {
    if (lease.pool == id) lose_from(lease, failed);
  }
}

void Leases::lose_from(Lease& lease, const std::unordered_set<PageId>& failed) {
  PagePool& target = pools_.at(lease.pool);
  const auto end = std::ranges::find_if(
      lease.held, [&](const Held& held) { return failed.contains(held.anchor); });
  const bool broken = end != lease.held.end();
  lease.stray.insert(lease.stray.end(), end, lease.held.end());
  lease.held.erase(end, lease.held.end());
  for (Held& held : lease.stray) {  // also of a transfer behind one that has failed before
    if (!failed.contains(held.anchor)) continue;
    target.unpin(held.anchor);
    if (held.page == held.anchor) held.page = kNoPage;
    held.anchor = kNoPage;
  }
  if (!broken) return;
  lease.depends.clear();  // another transfer may fill nothing but what it does not hold now
  for (const Held& held : lease.held) {
    if (const auto transfer = transfers_.into(lease.pool, held.anchor)) {
      lease.depends.push_back(*transfer);
    }
  }
}

uint32_t Leases::held_in(LeaseId id, PoolId of) const {
  const Lease& lease = get(id);
  return static_cast<uint32_t>(std::ranges::count_if(lease.held, [&](const Held& held) {
    return tree_.resident(tree_.owner(lease.pool, held.anchor), of);
  }));
}

uint32_t Leases::page_size(LeaseId id) const { return tree_.spaces[get(id).space].page_size; }

std::vector<LeaseId> Leases::in_pool(PoolId pool) const {
  std::vector<LeaseId> found;
  for (const auto& [id, lease] : leases_) {
    if (lease.pool == pool) found.push_back(id);
  }
  return found;
}

bool Leases::use_space(uint32_t space) const {
  return std::ranges::any_of(leases_, [&](const auto& each) { return each.second.space == space; });
}

void Leases::halve_stamps() {
  for (auto& [id, lease] : leases_) {
    lease.stamp /= 2;
    if (lease.above) lease.above->stamp /= 2;
  }
}

}  // namespace kvc2
