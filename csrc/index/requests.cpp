// Index: namespaces, and what requests and movers ask of leases and transfers.
#include <algorithm>

#include "index/index.h"

namespace kvc2 {

constexpr uint32_t kSiblingsOfAcquire = 16;  // every request pays for them: 1 us

uint32_t Index::open_namespace(const Digest& name, uint32_t page_size, bool opaque) {
  const Lock lock(mutex_);
  if (page_size == 0 || page_size > kMaxPageSize)
    throw std::invalid_argument("page_size: 1 to 512");
  const auto [at, fresh] = space_ids_.try_emplace(root_key(name), 0);
  if (fresh) return at->second = tree_.add_space(name, page_size, opaque);
  if (tree_.spaces[at->second].name != name)
    throw std::invalid_argument("namespace: key collision");
  if (tree_.spaces[at->second].page_size != page_size) {
    throw std::invalid_argument("page_size: the namespace was opened with " +
                                std::to_string(tree_.spaces[at->second].page_size));
  }
  if (tree_.spaces[at->second].opaque != opaque) {
    throw std::invalid_argument("opaque: the namespace was opened for the other kind of blocks");
  }
  return at->second;
}

bool Index::close_namespace(uint32_t space) {
  const Lock lock(mutex_);
  const Digest name = open_space(space).name;
  if (tree_.pins.of_space(space) || leases_.use_space(space)) return false;
  if (key_leases_.use_space(space)) return false;
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
  if (tree_.spaces[space].page_size != pools_.at(id).shape.page_size) {
    throw std::invalid_argument("pool: its page_size is not the namespace's");
  }
}

void Index::check_tokens(uint32_t space, PoolId id) const {
  check_space(space, id);
  if (tree_.spaces[space].opaque) {
    throw std::invalid_argument("namespace: its blocks are named by keys, not by tokens");
  }
}

void Index::check_leasable(PoolId id) const {
  if (pools_.at(id).closed) {
    throw std::invalid_argument("pool: " + std::to_string(id) + " is closed");
  }
  if (pools_.at(id).shape.durable) {
    throw std::invalid_argument("pool: " + std::to_string(id) + " is durable; lease above it");
  }
}

// The stamp of a new use. Where the 32-bit clock is about to overflow, all stamps are halved.
uint32_t Index::tick() {
  if (stamp_ >= 0xFFFFFFFE) {  // a restored stamp may be the very last
    tree_.halve_stamps();
    leases_.halve_stamps();
    key_leases_.halve_stamps();
    stamp_ = 0x7FFFFFFF;
  }
  return ++stamp_;
}

Match Index::match(uint32_t space, PoolId head, const Content& prompt) const {
  const Lock lock(mutex_);
  check_tokens(space, head);
  const std::vector<PoolId> pools = pools_.chain(head);
  const Found found = find_resident(tree_, space, pools, tree_.find(space, prompt));
  Match match{static_cast<uint32_t>(found.tiers.size()), std::vector<uint32_t>(pools.size(), 0)};
  for (const uint8_t tier : found.tiers) ++match.tiers[tier];
  return match;
}

Explanation Index::explain(uint32_t space, std::span<const PoolId> pools,
                           const Content& prompt) const {
  const Lock lock(mutex_);
  if (pools.empty() || pools.size() > 0xFF) throw std::invalid_argument("pools: 1 to 255 of them");
  for (const PoolId each : pools) check_tokens(space, each);
  const Found found = find_resident(tree_, space, pools, tree_.find(space, prompt));
  return explanation_of(tree_, evictor_.obituaries(), found, prompt, kSiblingsMax);
}

LeaseView Index::acquire(uint32_t space, PoolId head, const Content& prompt, uint32_t max_blocks,
                         const Hints& hints, uint32_t skip_blocks, bool touches) {
  const Lock lock(mutex_);
  check_tokens(space, head);
  check_leasable(head);
  const size_t size = tree_.spaces[space].page_size;
  const size_t blocks = std::min<size_t>(prompt.tokens.size() / size, max_blocks);
  const Content asked = prompt.before(blocks, size);
  const std::vector<PoolId> pools = pools_.chain(head);
  const uint32_t stamp = tick();
  Found found = find_resident(tree_, space, pools, tree_.join(tree_.find(space, asked)));
  Explanation why = explanation_of(tree_, evictor_.obituaries(), found, asked, kSiblingsOfAcquire);
  LeaseView opened = leases_.open(
      ++last_lease_, {pools, prompt, blocks, stamp, hints, skip_blocks, touches}, std::move(found));
  opened.explanation = std::move(why);
  return opened;
}

LeaseView Index::lease(LeaseId id) const {
  const Lock lock(mutex_);
  return leases_.view(id);
}

void Index::shorten(LeaseId id, uint32_t blocks) {
  const Lock lock(mutex_);
  leases_.shorten(id, blocks);
}

Load Index::next_load(LeaseId id, uint32_t max_pages) {
  const Lock lock(mutex_);
  if (key_leases_.has(id)) return key_leases_.next_load(id, max_pages);
  return leases_.next_load(id, max_pages);
}

std::optional<Transfer> Index::promote(LeaseId id, uint32_t max_pages) {
  const Lock lock(mutex_);
  if (key_leases_.has(id)) return key_leases_.promote(id, max_pages);
  return leases_.promote(id, max_pages);
}

// In slices. Where the lease is released between two slices, the next one throws UnknownId.
std::vector<CommitResult> Index::commit(LeaseId id, const Content& all,
                                        std::span<const PageId> pages) {
  std::vector<CommitResult> results(pages.size(), CommitResult::kRefused);
  size_t done = 0, blocks = 0;
  do {
    const Lock lock(mutex_);
    const size_t size = leases_.page_size(id);
    if (all.tokens.size() != pages.size() * size) {
      throw std::invalid_argument("tokens: not page_size for each of pages");
    }
    blocks = std::min<size_t>(pages.size() - done, kSliceCommits);
    leases_.commit(id, all.before(done + blocks, size).after(done, size),
                   pages.subspan(done, blocks), std::span(results).subspan(done, blocks));
    done += blocks;
  } while (done < pages.size() && results[done - 1] != CommitResult::kRefused);
  return results;
}

// Nobody waits for a release, so the reuse curve learns here what acquires have noted.
void Index::release(LeaseId id, const Hints& hints) {
  {
    const Lock lock(mutex_);
    if (key_leases_.has(id)) return key_leases_.release(id, hints);
    leases_.release(id, hints);
  }
  catch_up();
}

uint32_t Index::release_all(std::span<const LeaseId> leases) {
  uint32_t released = 0;
  for (const LeaseId lease : leases) {
    const Lock lock(mutex_);
    released += leases_.close(lease) || key_leases_.close(lease);
  }
  catch_up();
  return released;
}

void Index::catch_up() {
  for (bool more = true; more;) {
    const Lock lock(mutex_);
    more = curve_.catch_up();
  }
}

std::vector<double> Index::hit_rates(std::span<const uint64_t> capacities) {
  catch_up();
  const Lock lock(mutex_);
  std::vector<double> rates;
  for (const uint64_t capacity : capacities) rates.push_back(curve_.hit_rate(capacity));
  return rates;
}

uint32_t Index::held_in(LeaseId id, PoolId of) const {
  const Lock lock(mutex_);
  pools_.at(of);
  if (key_leases_.has(id)) return key_leases_.held_in(id, of);
  return leases_.held_in(id, of);
}

Load Index::prefetch(uint32_t space, PoolId head, const Content& prefix, uint32_t max_pages,
                     bool touches) {
  const Lock lock(mutex_);
  check_tokens(space, head);
  const std::vector<PoolId> pools = pools_.chain(head);
  const Found found = find_resident(tree_, space, pools, tree_.find(space, prefix));
  if (touches) {
    const uint32_t stamp = tick();
    for (const Run& run : found.path) tree_.touch(run, stamp);
  }
  return transfers_.prefetch(found, pools, prefix, max_pages);
}

std::optional<Transfer> Index::plan_demote(PoolId id, uint32_t max_pages, uint32_t ahead) {
  while (true) {
    const Lock lock(mutex_);
    auto [transfer, more] = transfers_.plan_demote(id, max_pages, ahead);
    if (transfer || !more) return std::move(transfer);
  }
}

void Index::insist(LeaseId id) {
  const Lock lock(mutex_);
  if (key_leases_.has(id)) return key_leases_.insist(id);
  leases_.insist(id);
}

// What is there when its slice's turn comes, and was refused, or waits, or is on its way: not what
// the pool had and has evicted.
uint64_t Index::insist_all(PoolId id) {
  uint64_t insisted = 0;
  for (PoolId above = 0, pools = id + 1; above < pools; ++above) {
    for (PageId page = 0, end = 1; page < end; page += kSlicePages) {
      const Lock lock(mutex_);
      pools_.at(id);
      pools = pools_.size();
      if (!pools_.is_above(above, id)) break;
      const std::vector<PoolId> chain = pools_.chain(above);
      end = pools_[above].size();  // the pool may grow between slices
      for (PageId at = page; at < std::min(end, page + kSlicePages); ++at) {
        if (!pools_[above].on_its_way_down(at)) continue;
        insisted += transfers_.insist(tree_.owner(above, at), chain);
      }
    }
  }
  return insisted;
}

Regret Index::regret(uint8_t tier) const {
  const Lock lock(mutex_);
  return policy_->regret(tier);
}

std::optional<Transfer> Index::plan_move(PoolId id, uint32_t slab, uint32_t max_pages) {
  const Lock lock(mutex_);
  return transfers_.plan_move(id, slab, max_pages);
}

// Leases let go of the pages that have not come before those pages are free.
std::vector<PageId> Index::complete(TransferId id, uint32_t done) {
  const Lock lock(mutex_);
  const Transfers::Ended ended = transfers_.complete(id, done);
  leases_.lose(ended.target, ended.failed);
  key_leases_.lose(ended.target, ended.failed);
  transfers_.free_failed(ended);
  return ended.left;
}

uint64_t Index::undemoted(PoolId id) const {
  const Lock lock(mutex_);
  return pools_.at(id).waiting();
}

// A block that is in several pools above counts in the first of them.
uint64_t Index::not_admitted(PoolId id) const {
  uint64_t count = 0;
  for (PoolId above = 0, pools = id + 1; above < pools; ++above) {
    for (PageId page = 0, end = 1; page < end; page += kSlicePages) {
      const Lock lock(mutex_);
      if (!pools_.at(id).shape.second_access) return 0;
      pools = pools_.size();
      if (!pools_.is_above(above, id)) break;
      end = pools_[above].size();  // the pool may grow between slices
      for (PageId at = page; at < std::min(end, page + kSlicePages); ++at) {
        count += transfers_.kept_out(id, above, at);
      }
    }
  }
  return count;
}

}  // namespace kvc2
