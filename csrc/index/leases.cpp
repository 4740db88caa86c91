// Index: what a request does. Match, acquire, commit, release.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "index/index.h"

namespace kvc2 {

constexpr uint32_t kSiblingsOfAcquire = 16;  // every request pays for them: 1 us

uint32_t Index::open_namespace(const Digest& name, uint32_t page_size) {
  const Lock lock(mutex_);
  if (page_size == 0 || page_size > kMaxPageSize)
    throw std::invalid_argument("page_size: 1 to 512");
  const auto [at, fresh] = space_ids_.try_emplace(root_key(name), 0);
  if (fresh) return at->second = tree_.add_space(name, page_size);
  if (tree_.spaces[at->second].name != name)
    throw std::invalid_argument("namespace: key collision");
  if (tree_.spaces[at->second].page_size != page_size) {
    throw std::invalid_argument("page_size: the namespace was opened with " +
                                std::to_string(tree_.spaces[at->second].page_size));
  }
  return at->second;
}

bool Index::close_namespace(uint32_t space) {
  const Lock lock(mutex_);
  const Digest name = open_space(space).name;
  const auto uses = [&](const auto& each) { return each.second.space == space; };
  if (tree_.pins.of_space(space) || std::ranges::any_of(leases_, uses)) return false;
  if (!tree_.close_space(space)) return false;
  space_ids_.erase(root_key(name));
  return true;
}

const Space& Index::open_space(uint32_t space) const {
  if (space >= tree_.spaces.size() || tree_.spaces[space].closed) {
    throw UnknownId("namespace " + std::to_string(space));
  }
  return tree_.spaces[space];
}

void Index::check_space(uint32_t space, PoolId id) const {
  open_space(space);
  if (tree_.spaces[space].page_size != pool(id).shape.page_size) {
    throw std::invalid_argument("pool: its page_size is not the namespace's");
  }
}

const Index::Lease& Index::open_lease(LeaseId id) const {
  const auto found = leases_.find(id);
  if (found == leases_.end()) throw UnknownId("lease " + std::to_string(id));
  return found->second;
}

// Appends the fastest pool that holds each leading block of the run; stops at one that none holds.
uint32_t Index::tiers_of(const Run& run, std::span<const PoolId> chain,
                         std::vector<uint8_t>& tiers) const {
  uint32_t end = 0;  // of the blocks whose tier is known
  while (end < run.blocks) {
    Run rest{run.node, run.offset + end, run.blocks - end};
    uint8_t tier = 0;
    uint32_t blocks = tree_.resident_blocks(rest, chain[0]);
    while (blocks == 0 && ++tier < chain.size()) {
      // a faster pool that holds later ones has its say about each
      if (!tree_.pages(rest, chain[tier - 1]).empty()) rest.blocks = 1;
      blocks = tree_.resident_blocks(rest, chain[tier]);
    }
    if (blocks == 0) break;
    tiers.insert(tiers.end(), blocks, tier);
    end += blocks;
  }
  return end;
}

// The leading blocks of a path of the tree.
Index::Found Index::find(uint32_t space, std::span<const PoolId> pools,
                         const std::vector<Run>& path) const {
  const bool retired = tree_.spaces[space].retired;
  Found found{.space = space, .last = {tree_.spaces[space].root, kBeforeFirst}};
  for (Run run : path) {
    const Run living{run.node, run.offset, retired ? 0 : tree_.living_blocks(run)};
    const uint32_t matched = tiers_of(living, pools, found.tiers);
    const uint32_t blocks = std::exchange(run.blocks, matched);
    if (run.blocks > 0) {
      found.last = {run.node, run.offset + run.blocks - 1};
      found.path.push_back(run);
    }
    if (run.blocks < blocks) {
      found.passed = Place{run.node, run.offset + run.blocks};
      break;
    }
  }
  return found;
}

Match Index::match(uint32_t space, PoolId head, Tokens tokens) const {
  const Lock lock(mutex_);
  check_space(space, head);
  const std::vector<PoolId> pools = chain(head);
  const std::vector<uint8_t> tiers = find(space, pools, tree_.find(space, tokens)).tiers;
  Match match{static_cast<uint32_t>(tiers.size()), std::vector<uint32_t>(pools.size(), 0)};
  for (const uint8_t tier : tiers) ++match.tiers[tier];
  return match;
}

uint32_t Index::tick() {
  if (stamp_ >= 0xFFFFFFFE) {  // a restored stamp may be the very last
    tree_.halve_stamps();
    for (auto& [id, lease] : leases_) lease.stamp /= 2;
    stamp_ = 0x7FFFFFFF;
  }
  return ++stamp_;
}

LeaseView Index::acquire(uint32_t space, PoolId head, Tokens tokens, uint32_t max_blocks,
                         const Hints& hints) {
  const Lock lock(mutex_);
  check_space(space, head);
  if (pool(head).closed)
    throw std::invalid_argument("pool: " + std::to_string(head) + " is closed");
  const size_t size = tree_.spaces[space].page_size;
  const size_t limit = std::min<size_t>(tokens.size() / size, max_blocks);
  const std::vector<PoolId> pools = chain(head);
  Lease lease{.space = space, .pool = head, .stamp = tick(), .hints = hints};
  Found found = find(space, pools, tree_.join(tree_.find(space, tokens.first(limit * size))));
  Explanation why = explanation(found, tokens.first(limit * size), kSiblingsOfAcquire);
  lease.found = std::move(found.tiers);
  lease.matched = static_cast<uint32_t>(lease.found.size());
  hold_leading(lease, found.path);
  for (const Run& run : found.path) {
    tree_.touch(run, lease.stamp);
    tree_.use_again(run);
    requeue(run, pools);
  }
  tree_.say(found.last, hints.life(tree_.now()), kNoneFresh);
  lease.tokens_from = static_cast<uint32_t>(lease.held.size());
  const Tokens rest = tokens.first(lease.matched * size).subspan(lease.tokens_from * size);
  lease.tokens.assign(rest.begin(), rest.end());
  register_computing(lease, keys_after(lease, tokens, found.path));
  learn(lease, found.path, limit, tokens.size());
  const LeaseId id = ++last_lease_;
  LeaseView opened = view(id, leases_.emplace(id, std::move(lease)).first->second);
  opened.explanation = std::move(why);
  return opened;
}

// The caller refreshes the nodes.
void Index::hold_leading(Lease& lease, const std::vector<Run>& path) {
  for (const Run& run : path) {
    if (hold(lease, run) < run.blocks) return;
  }
}

// Pins the pages that the lease's pool has of the run from its first block on; how many. The caller
// refreshes the node.
uint32_t Index::hold(Lease& lease, const Run& run) {
  PagePool& from = pool(lease.pool);
  uint32_t held = 0;
  for (const PageId page : tree_.pages(run, lease.pool)) {
    if (page == kNoPage) break;
    from.pin(page);
    if (const auto transfer = transfer_into(lease.pool, page)) lease.depends.push_back(*transfer);
    lease.held.push_back({page, page, lease.found[lease.held.size()]});
    ++held;
  }
  return held;
}

// What was asked for, found or not.
void Index::learn(const Lease& lease, const std::vector<Run>& path, size_t blocks,
                  uint64_t tokens) {
  std::vector<BlockKey> keys;
  keys.reserve(blocks);
  for (const Run& run : path) {
    const auto from = tree_[run.node].keys.begin() + run.offset;
    keys.insert(keys.end(), from, from + run.blocks);
  }
  const size_t rest = std::min(blocks - keys.size(), lease.unmatched.size());
  keys.insert(keys.end(), lease.unmatched.begin(), lease.unmatched.begin() + rest);
  curve_.access(keys, tree_.spaces[lease.space].page_size, tokens);
}

std::vector<double> Index::hit_rates(std::span<const uint64_t> capacities) {
  catch_up();
  const Lock lock(mutex_);
  std::vector<double> rates;
  for (const uint64_t capacity : capacities) rates.push_back(curve_.hit_rate(capacity));
  return rates;
}

std::vector<BlockKey> Index::keys_after(const Lease& lease, Tokens tokens,
                                        const std::vector<Run>& path) const {
  const Space& space = tree_.spaces[lease.space];
  BlockKey key = root_key(space.name);
  if (!path.empty())
    key = tree_[path.back().node].keys[path.back().offset + path.back().blocks - 1];
  const Tokens rest = tokens.subspan(size_t{lease.matched} * space.page_size);
  return chain_keys(key, rest, space.page_size);
}

// The blocks after `matched` are these, and the lease computes them.
void Index::register_computing(Lease& lease, std::vector<BlockKey>&& keys) {
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

// Blocks before `end` are no longer being computed by this lease.
void Index::unregister_computing(Lease& lease, uint32_t end) {
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

// What a pool of the chain holds and the pool below it lacks is considered for demotion again.
void Index::requeue(const Run& run, std::span<const PoolId> chain) {
  for (size_t tier = 0; tier + 1 < chain.size(); ++tier) {
    if (tree_.holds_all(run, chain[tier + 1])) continue;
    PagePool& from = pool(chain[tier]);
    const std::span<const PageId> there = tree_.pages(run, chain[tier]);
    for (uint32_t i = 0; i < there.size(); ++i) {
      const bool lacking = tree_.page({run.node, run.offset + i}, chain[tier + 1]) == kNoPage;
      if (lacking && from.is(there[i], PageState::kResident)) from.enqueue(there[i]);
    }
  }
}

LeaseView Index::view(LeaseId id, const Lease& lease) const {
  LeaseView view{id, lease.matched,   {}, std::vector<uint32_t>(chain(lease.pool).size(), 0),
                 0,  lease.computing, {}};
  for (const Held& held : lease.held) {
    view.pages.push_back(held.page);
    if (held.tier != kComputed) ++view.tiers[held.tier];
  }
  for (size_t block = lease.held.size(); block < lease.matched; ++block) {
    if (view.ahead.empty() || view.ahead.back().tier != lease.found[block]) {
      view.ahead.push_back({lease.found[block], 0});
    }
    ++view.ahead.back().blocks;
  }
  for (const TransferId transfer : lease.depends) {
    if (transfers_.contains(transfer)) view.transfer = std::max(view.transfer, transfer);
  }
  return view;
}

LeaseView Index::lease(LeaseId id) const {
  const Lock lock(mutex_);
  return view(id, open_lease(id));
}

void Index::shorten(LeaseId id, uint32_t blocks) {
  const Lock lock(mutex_);
  auto& lease = const_cast<Lease&>(open_lease(id));
  const auto held = static_cast<uint32_t>(lease.held.size());
  const uint32_t end = std::max(held, blocks);
  const auto computed = [](const Held& each) { return each.tier == kComputed; };
  if (end >= lease.matched || held < lease.tokens_from ||
      std::ranges::any_of(lease.held, computed) || std::ranges::any_of(lease.stray, computed)) {
    return;
  }
  const Space& space = tree_.spaces[lease.space];
  const Place at = cursor(lease);
  const BlockKey key = held == 0 ? root_key(space.name) : tree_[at.node].keys[at.offset];
  const Tokens after =
      Tokens(lease.tokens).subspan(size_t{held - lease.tokens_from} * space.page_size);
  std::vector<BlockKey> keys = chain_keys(key, after, space.page_size);
  keys.erase(keys.begin(), keys.begin() + (end - held));
  keys.insert(keys.end(), lease.unmatched.begin(), lease.unmatched.end());
  unregister_computing(lease, 0xFFFFFFFF);
  lease.matched = end;
  lease.found.resize(end);
  lease.tokens.resize(size_t{end - lease.tokens_from} * space.page_size);
  register_computing(lease, std::move(keys));
}

// The last block that the lease holds.
Place Index::cursor(const Lease& lease) const {
  if (lease.held.empty()) return {tree_.spaces[lease.space].root, kBeforeFirst};
  return tree_.owner(lease.pool, lease.held.back().anchor);
}

// From `at` to the lease's `block`, if that was matched and is still in the tree.
std::optional<Place> Index::step(const Lease& lease, Place at, uint32_t block) const {
  if (block < lease.tokens_from || block >= lease.matched) return std::nullopt;
  const size_t size = tree_.spaces[lease.space].page_size;
  const auto next =
      tree_.next(at, Tokens(lease.tokens).subspan((block - lease.tokens_from) * size, size));
  if (next && tree_.dead(*next)) return std::nullopt;
  return next;
}

// In slices; a lease that is released between two of them is unknown to the next.
std::vector<CommitResult> Index::commit(LeaseId id, uint32_t first_block, Tokens tokens,
                                        std::span<const PageId> pages) {
  std::vector<CommitResult> results(pages.size(), CommitResult::kRefused);
  size_t done = 0, blocks = 0;
  do {
    const Lock lock(mutex_);
    auto& lease = const_cast<Lease&>(open_lease(id));
    const size_t size = tree_.spaces[lease.space].page_size;
    if (tokens.size() != pages.size() * size) {
      throw std::invalid_argument("tokens: not page_size for each of pages");
    }
    blocks = std::min<size_t>(pages.size() - done, kSliceCommits);
    const auto slice = std::span(results).subspan(done, blocks);
    commit_slice(lease, uint64_t{first_block} + done, tokens.subspan(done * size, blocks * size),
                 pages.subspan(done, blocks), slice);
    done += blocks;
  } while (done < pages.size() && results[done - 1] != CommitResult::kRefused);
  return results;
}

void Index::commit_slice(Lease& lease, uint64_t first_block, Tokens tokens,
                         std::span<const PageId> pages, std::span<CommitResult> results) {
  const size_t size = tree_.spaces[lease.space].page_size;
  if (tree_.spaces[lease.space].retired) return;
  const size_t before = lease.held.size();
  Place at = cursor(lease);
  const uint32_t known = tree_.blocks;
  uint32_t fresh = kNoneFresh;  // the first block that is new to the tree
  for (size_t i = 0; i < pages.size(); ++i) {
    const Tokens block = tokens.subspan(i * size, size);
    const uint64_t position = first_block + i;
    if (position > lease.held.size()) break;
    results[i] = position < lease.held.size()
                     ? commit_again(lease, static_cast<uint32_t>(position), block, pages[i])
                     : commit_next(lease, at, block, pages[i]);
    if (results[i] == CommitResult::kRefused) break;
    if (fresh == kNoneFresh && tree_.blocks > known) fresh = static_cast<uint32_t>(position);
    if (lease.held.size() == position + 1 && tree_.last(at)) {  // the rest is in no tree
      const uint32_t adopted =
          commit_rest(lease, at.node, tokens.subspan((i + 1) * size), pages.subspan(i + 1));
      std::ranges::fill(results.subspan(i + 1, adopted), CommitResult::kAdopted);
      if (fresh == kNoneFresh) fresh = static_cast<uint32_t>(position) + 1;
      break;
    }
  }
  // acquire has asked for all blocks of the prompt, but for a last one that it ends with
  const size_t asked = lease.matched + lease.unmatched.size();
  for (size_t i = std::max(before, asked - (asked > 0)); i < lease.held.size(); ++i) {
    const Place held = tree_.owner(lease.pool, lease.held[i].anchor);
    curve_.add(tree_[held.node].keys[held.offset], static_cast<uint32_t>(size));
  }
  tree_.say(cursor(lease), lease.hints.life(tree_.now()), fresh);
  unregister_computing(lease, static_cast<uint32_t>(lease.held.size()));
}

CommitResult Index::commit_again(const Lease& lease, uint32_t block, Tokens tokens,
                                 PageId page) const {
  const Held& held = lease.held[block];
  if (held.page != page) return CommitResult::kRefused;
  const Place at = tree_.owner(lease.pool, held.anchor);
  if (!std::ranges::equal(tree_.tokens(at), tokens)) return CommitResult::kRefused;
  return held.page == held.anchor ? CommitResult::kAdopted : CommitResult::kDuplicate;
}

// The block after `at`, which moves on to it.
CommitResult Index::commit_next(Lease& lease, Place& at, Tokens tokens, PageId page) {
  PagePool& into = pool(lease.pool);
  if (!into.is(page, PageState::kPrivate) || into[page].held) return CommitResult::kRefused;
  const auto block = tree_.insert(at, tokens, lease.stamp);
  if (!block) {
    ++collisions_;
    return CommitResult::kRefused;
  }
  at = *block;
  if (tree_[at.node].uses[at.offset].stamp < lease.stamp) {
    tree_.touch({at.node, at.offset, 1}, lease.stamp);
  }
  const PageId there = tree_.page(at, lease.pool);
  if (there == kNoPage) {
    into.move(page, PageState::kResident);
    tree_.place(at, lease.pool, page);
    into.enqueue(page);
  } else {
    into[page].held = 1;
    if (const auto transfer = transfer_into(lease.pool, there)) lease.depends.push_back(*transfer);
  }
  const PageId anchor = there == kNoPage ? page : there;
  into.pin(anchor);
  lease.held.push_back({page, anchor, kComputed});
  tree_.refresh(at.node);
  return there == kNoPage ? CommitResult::kAdopted : CommitResult::kDuplicate;
}

// Blocks after the last one of `node`, which nothing hangs on; how many of them have a page that
// may be committed.
uint32_t Index::commit_rest(Lease& lease, NodeId node, Tokens tokens,
                            std::span<const PageId> pages) {
  constexpr size_t kAhead = 16;  // page ids are in no order, so that each is a wait for memory
  PagePool& into = pool(lease.pool);
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
  tree_.place(run, lease.pool, pages.first(adopted));
  tree_.refresh(node);
  return adopted;
}

// Nobody waits for a release: what acquires have noted for the reuse curve is learnt here.
void Index::release(LeaseId id, const Hints& hints) {
  {
    const Lock lock(mutex_);
    auto& lease = const_cast<Lease&>(open_lease(id));
    if (hints != Hints{}) lease.hints = hints;
    const Place at = cursor(lease);
    tree_.say(at, lease.hints.life(tree_.now()), kNoneFresh);
    if (lease.hints.session_end) tree_.end_tail(at, lease.stamp);
    close_lease(lease);
    leases_.erase(id);
  }
  catch_up();
}

void Index::catch_up() {
  for (bool more = true; more;) {
    const Lock lock(mutex_);
    more = curve_.catch_up();
  }
}

void Index::close_lease(Lease& lease) {
  let_go(lease.pool, lease.held);
  let_go(lease.pool, lease.stray);
  unregister_computing(lease, 0xFFFFFFFF);
}

void Index::let_go(PoolId id, std::span<const Held> held) {
  PagePool& from = pool(id);
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

}  // namespace kvc2
