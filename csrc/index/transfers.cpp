// Index: what should move between pools, and what became of it.
#include <algorithm>
#include <unordered_set>

#include "base/check.h"
#include "index/index.h"

namespace kvc2 {

static uint64_t in_flight_key(PoolId pool, PageId page) { return uint64_t{pool} << 32 | page; }

std::optional<TransferId> Index::transfer_into(PoolId id, PageId page) const {
  if (pool(id).state(page) != PageState::kInFlight) return std::nullopt;
  return in_flight_.at(in_flight_key(id, page));
}

// Whether nothing is evicted for what was sent back that itself waits to go further down: two such
// blocks would put each other out for ever. While the tenant has no room left in its quota, its own
// blocks pay, now or when they are trimmed.
bool Index::may_return(Place at, PoolId id) {
  const PagePool& target = pool(id);
  const TenantId tenant = tree_.spaces[tree_[at.node].space].tenant;
  const Quota* own = tree_.quotas.find(tenant, target.shape.tier);
  const bool full = own && own->full(1, target.shape.page_bytes);
  if (!full && (target.counts().free > 0 || target.waiting() == 0)) return true;
  const auto victim = full ? tree_.coldest_of(tenant, id) : victim_for(id, tenant, 0);
  return victim && tree_.spent(*victim, id);
}

// One more block of a plan: a page in the target, evicting there; false if there is none to be had.
// The block before it must not be the victim, or the target would get a gap.
bool Index::add(OpenTransfer& plan, Place at, bool sent_back) {
  PagePool& target = pool(plan.target);
  const bool evicts = sent_back || target.counts().free == 0;
  const auto above = evicts ? tree_.parent(at) : std::nullopt;
  const PageId anchor = above ? tree_.page(*above, plan.target) : kNoPage;
  if (anchor != kNoPage) {
    target.pin(anchor);
    tree_.refresh(above->node);
  }
  const TenantId tenant = tree_.spaces[tree_[at.node].space].tenant;
  const bool may = !sent_back || may_return(at, plan.target);
  const auto page = may ? allocate(plan.target, PageState::kInFlight, tenant) : std::nullopt;
  if (anchor != kNoPage) {
    target.unpin(anchor);
    tree_.refresh(above->node);
  }
  if (!page) return false;
  const PageId source = tree_.page(at, plan.source);
  tree_.place(at, plan.target, *page);
  pool(plan.source).pin(source);
  target.pin(*page);
  tree_.refresh(at.node);
  plan.source_pages.push_back(source);
  plan.target_pages.push_back(*page);
  return true;
}

static std::vector<Extent> extents_of(std::span<const PageId> source,
                                      std::span<const PageId> target) {
  std::vector<Extent> extents;
  for (size_t i = 0; i < source.size(); ++i) {
    if (!extents.empty()) {
      Extent& last = extents.back();
      if (last.source + last.pages == source[i] && last.target + last.pages == target[i]) {
        ++last.pages;
        continue;
      }
    }
    extents.push_back({source[i], target[i], 1});
  }
  return extents;
}

void Index::add_record(Records& records, Place at, uint64_t generation) {
  const Tokens tokens = tree_.tokens(at);
  records.namespaces.push_back(tree_.spaces[tree_[at.node].space].name);
  records.digests.push_back(tree_.digest(at));
  records.parents.push_back(tree_.parent_digest(at));
  records.keys.push_back(tree_[at.node].keys[at.offset]);
  records.tokens.insert(records.tokens.end(), tokens.begin(), tokens.end());
  records.generations.push_back(generation);
}

Records Index::records_of(const OpenTransfer& plan) {
  const bool to_durable = pool(plan.target).shape.durable;
  const PagePool& durable = pool(to_durable ? plan.target : plan.source);
  const auto& pages = to_durable ? plan.target_pages : plan.source_pages;
  Records records;
  for (size_t i = 0; i < pages.size(); ++i) {
    add_record(records, tree_.owner(plan.source, plan.source_pages[i]),
               durable.generations[pages[i]]);
  }
  return records;
}

Residents Index::residents(PoolId id, PageId first, uint32_t count) {
  Residents found;
  PageId page = first;
  in_slices(id, [&] {
    const PagePool& of = pool(id);
    if (!of.shape.durable) throw std::invalid_argument("pool: not a durable one");
    if (page >= of.size() || page - first >= count) return false;
    if (of.is(page, PageState::kResident)) {
      found.pages.push_back(page);
      add_record(found.records, tree_.owner(id, page), of.generations[page]);
    }
    ++page;
    return true;
  });
  return found;
}

Transfer Index::start(OpenTransfer&& plan) {
  PagePool& target = pool(plan.target);
  const TransferId id = ++last_transfer_;
  const size_t arriving = plan.is_move() ? 0 : plan.target_pages.size();
  for (const PageId page : std::span(plan.target_pages).first(arriving)) {
    in_flight_[in_flight_key(plan.target, page)] = id;
    if (target.shape.durable) target.generations[page] = generation_++;
  }
  Transfer transfer{id,
                    plan.source,
                    plan.target,
                    plan.source_pages,
                    plan.target_pages,
                    extents_of(plan.source_pages, plan.target_pages),
                    std::nullopt};
  if (target.shape.durable || pool(plan.source).shape.durable) transfer.records = records_of(plan);
  transfers_.emplace(id, std::move(plan));
  return transfer;
}

Load Index::next_load(LeaseId id, uint32_t max_pages) {
  const Lock lock(mutex_);
  const Lease& lease = open_lease(id);
  max_pages = std::min(max_pages, kTransferPages);
  const std::vector<PoolId> pools = chain(lease.pool);
  // Where the pool above the durable one is the lease's own, promote loads.
  if (pools.size() < 3 || !pool(pools.back()).shape.durable) return {};
  const PoolId target = pools[pools.size() - 2];
  if (pool(target).closed) return {};
  OpenTransfer plan{.source = pools.back(), .target = target};
  Place at = cursor(lease);
  const std::span memory(pools.begin(), pools.end() - 1);
  for (auto block = static_cast<uint32_t>(lease.held.size());
       block < lease.matched && plan.source_pages.size() < max_pages; ++block) {
    const auto next = step(lease, at, block);
    if (!next) break;
    at = *next;
    const bool near = tree_.page(at, lease.pool) != kNoPage ||
                      std::ranges::any_of(memory, [&](PoolId p) { return tree_.resident(at, p); });
    if (near && plan.source_pages.empty()) continue;
    if (near) break;
    const auto coming =
        std::ranges::find_if(memory, [&](PoolId p) { return tree_.page(at, p) != kNoPage; });
    if (coming != memory.end()) {
      if (!plan.source_pages.empty()) break;
      return Wait{*transfer_into(*coming, tree_.page(at, *coming))};
    }
    if (!tree_.resident(at, plan.source) || !add(plan, at)) break;
  }
  if (plan.source_pages.empty()) return {};
  return start(std::move(plan));
}

std::optional<Transfer> Index::promote(LeaseId id) {
  const Lock lock(mutex_);
  auto& lease = const_cast<Lease&>(open_lease(id));
  PagePool& into = pool(lease.pool);
  const auto below = into.shape.below;
  OpenTransfer plan{.source = below.value_or(0), .target = lease.pool};
  Place at = cursor(lease);
  while (const auto next = step(lease, at, static_cast<uint32_t>(lease.held.size()))) {
    at = *next;
    if (tree_.page(at, lease.pool) != kNoPage) {
      if (!plan.source_pages.empty()) break;
      hold(lease, {at.node, at.offset, 1});
      tree_.refresh(at.node);
      continue;
    }
    if (!below || !tree_.resident(at, *below) || !add(plan, at)) break;
    const PageId page = plan.target_pages.back();
    into.pin(page);
    lease.held.push_back({page, page, lease.found[lease.held.size()]});
  }
  if (plan.source_pages.empty()) return std::nullopt;
  Transfer transfer = start(std::move(plan));
  lease.depends.push_back(transfer.id);
  return transfer;
}

// The block of `page` and those before it that the target lacks, parents first; none if the page or
// one of them has gone from the source, the target has it already, it is dead, or not admitted yet.
std::vector<Place> Index::missing_below(PoolId source, PoolId target, PageId page) const {
  std::vector<Place> missing;
  if (!pool(source).is(page, PageState::kResident)) return missing;
  std::optional<Place> at = tree_.owner(source, page);
  if (tree_.dead(*at) || !admitted(*at, target)) return missing;
  for (; at && tree_.page(*at, target) == kNoPage; at = tree_.parent(*at)) {
    if (!tree_.resident(*at, source)) return {};
    missing.push_back(*at);
  }
  std::ranges::reverse(missing);
  return missing;
}

std::optional<Transfer> Index::plan_demote(PoolId id, uint32_t max_pages) {
  const Lock lock(mutex_);
  max_pages = std::min(max_pages, kTransferPages);
  PagePool& from = pool(id);
  if (!from.shape.below || pool(*from.shape.below).closed) return std::nullopt;
  OpenTransfer plan{.source = id, .target = *from.shape.below};
  bool full = false;
  for (auto* queue : {&from.undemoted, &from.sent_back}) {
    const auto add_next = [&](Place at) {
      return plan.source_pages.size() < max_pages && add(plan, at, queue == &from.sent_back);
    };
    while (!full && !queue->empty() && plan.source_pages.size() < max_pages) {
      const std::vector<Place> missing = missing_below(id, plan.target, queue->front());
      full = !std::ranges::all_of(missing, add_next);
      if (!full) from.dequeue(*queue);  // else it stays the first to be considered
    }
  }
  if (plan.source_pages.empty()) return std::nullopt;
  return start(std::move(plan));
}

uint64_t Index::undemoted(PoolId id) const {
  const Lock lock(mutex_);
  return pool(id).waiting();
}

// What was matched once has all of its prefix matched, so that no block is admitted without those
// before it.
bool Index::admitted(Place at, PoolId target) const {
  return !pool(target).shape.second_access || tree_.used_again(at);
}

// A block in several pools counts in the first of them.
uint64_t Index::not_admitted(PoolId id) const {
  uint64_t count = 0;
  for (PoolId above = 0, pools = id + 1; above < pools; ++above) {
    for (PageId page = 0, end = 1; page < end; page += kSlicePages) {
      const Lock lock(mutex_);
      if (!pool(id).shape.second_access) return 0;
      pools = static_cast<PoolId>(pools_.size());
      if (!is_above(above, id)) break;
      end = pools_[above]->size();  // the pool may grow between slices
      for (PageId at = page; at < std::min(end, page + kSlicePages); ++at) {
        count += refused_by(id, above, at);
      }
    }
  }
  return count;
}

bool Index::is_above(PoolId above, PoolId id) const {
  auto below = alive(above) ? pools_[above]->shape.below : std::nullopt;
  while (below && *below != id) below = pools_[*below]->shape.below;
  return below.has_value();
}

bool Index::refused_by(PoolId id, PoolId above, PageId page) const {
  if (!pools_[above]->is(page, PageState::kResident)) return false;
  const Place at = tree_.owner(above, page);
  if (tree_.dead(at) || tree_.page(at, id) != kNoPage || admitted(at, id)) return false;
  return std::ranges::none_of(tree_[at.node].pools, [&](const Residency& in) {
    return in.pool < above && is_above(in.pool, id) && tree_.resident(at, in.pool);
  });
}

uint32_t Index::held_in(LeaseId id, PoolId of) const {
  const Lock lock(mutex_);
  const Lease& lease = open_lease(id);
  pool(of);
  return static_cast<uint32_t>(std::ranges::count_if(lease.held, [&](const Held& held) {
    return tree_.resident(tree_.owner(lease.pool, held.anchor), of);
  }));
}

// What a slab holds goes to free pages of the others. A generation moves along: it names what was
// written, and the bytes stay the same.
std::optional<Transfer> Index::plan_move(PoolId id, uint32_t slab, uint32_t max_pages) {
  const Lock lock(mutex_);
  PagePool& in = pool(id);
  if (in.closed || !in.is_closed(slab)) return std::nullopt;
  max_pages = std::min(max_pages, kTransferPages);
  OpenTransfer plan{.source = id, .target = id};
  const PageId first = slab * in.shape.pages_per_slab;
  for (PageId page = first; page < first + in.shape.pages_per_slab; ++page) {
    if (plan.source_pages.size() == max_pages) break;
    if (in.state(page) != PageState::kResident || in[page].pins > 0) continue;
    const auto target = in.allocate(PageState::kPrivate);
    if (!target) break;
    in[*target].held = 1;
    if (in.shape.durable) in.generations[*target] = in.generations[page];
    in.pin(page);
    tree_.refresh(in[page].node);
    plan.source_pages.push_back(page);
    plan.target_pages.push_back(*target);
  }
  if (plan.source_pages.empty()) return std::nullopt;
  return start(std::move(plan));
}

// A block that somebody pinned meanwhile stays where it is.
std::vector<PageId> Index::complete_move(const OpenTransfer& move, uint32_t done) {
  PagePool& in = pool(move.source);
  std::vector<PageId> left;
  for (size_t i = 0; i < move.source_pages.size(); ++i) {
    const PageId from = move.source_pages[i], to = move.target_pages[i];
    const NodeId node = in[from].node;
    in.unpin(from);
    in[to].held = 0;
    if (i >= done || in[from].pins > 0) {
      in.free(to);
    } else {
      tree_.replace(tree_.owner(move.source, from), move.source, to);
      in.move(to, PageState::kResident);
      if (in[from].queued) in.enqueue(to);
      in.free(from);
      left.push_back(from);
    }
    tree_.refresh(node);
  }
  return left;
}

std::vector<PageId> Index::complete(TransferId id, uint32_t done) {
  const Lock lock(mutex_);
  const auto found = transfers_.find(id);
  if (found == transfers_.end()) throw UnknownId("transfer " + std::to_string(id));
  const auto count = static_cast<uint32_t>(found->second.source_pages.size());
  if (done > count) throw std::invalid_argument("done: more than the transfer has");
  const OpenTransfer transfer = std::move(found->second);
  transfers_.erase(found);
  if (transfer.failed) done = 0;
  if (transfer.is_move()) {
    return alive(transfer.source) ? complete_move(transfer, done) : std::vector<PageId>{};
  }
  if (alive(transfer.source)) {
    for (const PageId page : transfer.source_pages) {
      pool(transfer.source).unpin(page);
      tree_.refresh(pool(transfer.source)[page].node);
    }
  }
  if (!alive(transfer.target)) return {};
  const std::span pages(transfer.target_pages);
  for (const PageId page : pages) in_flight_.erase(in_flight_key(transfer.target, page));
  for (const PageId page : pages.first(done)) arrive(transfer.target, page);
  if (done == count) return {};
  fail(transfer.target, pages.subspan(done));
  if (!alive(transfer.source) || pool(transfer.source).shape.below != transfer.target) {
    return {};
  }
  for (const PageId page : std::span(transfer.source_pages).subspan(done)) {
    pool(transfer.source).enqueue(page);
  }
  return {};
}

void Index::arrive(PoolId id, PageId page) {
  PagePool& target = pool(id);
  target.move(page, PageState::kResident);
  target.unpin(page);
  const Place at = tree_.owner(id, page);
  tree_.arrive(at, id);
  const auto below = target.shape.below;
  if (below && tree_.page(at, *below) == kNoPage) target.enqueue(page);
  tree_.refresh(at.node);
}

// Leases on these pages end before the first of them; what they hold after it stays theirs until
// release, since an engine may still be reading it.
void Index::fail(PoolId id, std::span<const PageId> pages) {
  PagePool& target = pool(id);
  const std::unordered_set<PageId> failed(pages.begin(), pages.end());
  for (auto& [lease_id, lease] : leases_) {
    if (lease.pool != id) continue;
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
    if (!broken) continue;
    lease.depends.clear();  // another transfer may fill nothing but what it does not hold now
    for (const Held& held : lease.held) {
      if (const auto transfer = transfer_into(id, held.anchor)) lease.depends.push_back(*transfer);
    }
  }
  for (size_t i = pages.size(); i-- > 0;) {  // tail first: no block loses its parent
    target.unpin(pages[i]);
    drop(tree_.owner(id, pages[i]), id, Cause::kTransferFailed);
  }
}

}  // namespace kvc2
