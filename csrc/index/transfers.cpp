#include "index/transfers.h"

#include <algorithm>

namespace kvc2 {

std::optional<TransferId> Transfers::into(PoolId id, PageId page) const {
  if (pools_.at(id).state(page) != PageState::kInFlight) return std::nullopt;
  return in_flight_.at(name_of(id, page));
}

// Whether the block may come back to the pool without evicting a block that itself awaits its
// demotion: two such blocks would evict each other for ever. Where the tenant's quota has no room
// left, the tenant's own blocks are evicted, now or when they are trimmed.
bool Transfers::may_return(Place at, PoolId id) {
  const PagePool& target = pools_.at(id);
  const TenantId tenant = tree_.spaces[tree_[at.node].space].tenant;
  const Quota* own = tree_.quotas.find(tenant, target.shape.tier);
  const bool full = own && own->full(1, target.shape.page_bytes);
  if (!full && (target.counts().free > 0 || target.waiting() == 0)) return true;
  const auto victim = full ? tree_.coldest_of(tenant, id) : evictor_.victim_for(id, tenant);
  return victim && tree_.spent(*victim, id);
}

// The block before it is pinned in the target meanwhile: evicting that one would leave a gap.
Transfers::Tried Transfers::try_add(Plan& plan, Place at, const How& how) {
  PagePool& target = pools_.at(plan.target);
  const bool full = target.counts().free <= (target.shape.durable ? how.ahead : 0);
  const bool evicts = how.sent_back || full;
  const auto above = evicts ? tree_.parent(at) : std::nullopt;
  const PageId anchor = above ? tree_.page(*above, plan.target) : kNoPage;
  if (anchor != kNoPage) {
    target.pin(anchor);
    tree_.refresh(above->node);
  }
  const TenantId tenant = tree_.spaces[tree_[at.node].space].tenant;
  Given given;
  if (!how.sent_back || may_return(at, plan.target)) {
    const auto state = PageState::kInFlight;
    if (how.judged && full) {  // else there is nobody to give way
      given = evictor_.offer(plan.target, state, newcomer(at, plan.target), 0, how.ahead);
    } else {
      given.page = evictor_.allocate(plan.target, state, tenant);
    }
  }
  if (anchor != kNoPage) {
    target.unpin(anchor);
    tree_.refresh(above->node);
  }
  if (!given.page) return {.refused = given.refused};
  const PageId source = tree_.page(at, plan.source);
  tree_.place(at, plan.target, *given.page);
  pools_.at(plan.source).pin(source);
  target.pin(*given.page);
  tree_.refresh(at.node);
  plan.source_pages.push_back(source);
  plan.target_pages.push_back(*given.page);
  return {.added = true};
}

bool Transfers::offer(Plan& plan, Place at) {
  const Tried tried = try_add(plan, at, {.judged = true});
  if (tried.refused) pools_.at(plan.target).count_refusals(1);
  return tried.added;
}

Newcomer Transfers::newcomer(Place at, PoolId target) const {
  const Node& node = tree_[at.node];
  const BlockKey& key = node.keys[at.offset];
  const bool below = tree_.resident_below(at, target);
  return {.key = key,
          .use = node.uses[at.offset],
          .standing = tree_.standing_in(target, key, tree_.life(at), below),
          .tenant = tree_.spaces[node.space].tenant};
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

Records Transfers::records_of(const Plan& plan) {
  const bool to_durable = pools_.at(plan.target).shape.durable;
  const PagePool& durable = pools_.at(to_durable ? plan.target : plan.source);
  const auto& pages = to_durable ? plan.target_pages : plan.source_pages;
  Records records;
  for (size_t i = 0; i < pages.size(); ++i) {
    records.append(tree_, tree_.owner(plan.source, plan.source_pages[i]),
                   durable.generations[pages[i]]);
  }
  return records;
}

Transfer Transfers::start(Plan&& plan) {
  PagePool& target = pools_.at(plan.target);
  const TransferId id = ++last_;
  const size_t arriving = plan.is_move() ? 0 : plan.target_pages.size();
  for (const PageId page : std::span(plan.target_pages).first(arriving)) {
    in_flight_[name_of(plan.target, page)] = id;
    if (target.shape.durable) target.generations[page] = generation_++;
  }
  Transfer transfer{id,
                    plan.source,
                    plan.target,
                    plan.source_pages,
                    plan.target_pages,
                    extents_of(plan.source_pages, plan.target_pages),
                    std::nullopt};
  if (target.shape.durable || pools_.at(plan.source).shape.durable) {
    transfer.records = records_of(plan);
  }
  open_.emplace(id, Open{std::move(plan)});
  return transfer;
}

// What the demotion of `page` takes: its block and the blocks before it that the target lacks,
// parents first. None if one of them is not resident in the source, or if the block of `page` is
// dead, is in the target already, or is not admitted there.
std::vector<Place> Transfers::missing_below(PoolId source, PoolId target, PageId page) const {
  std::vector<Place> missing;
  if (!pools_.at(source).is(page, PageState::kResident)) return missing;
  std::optional<Place> at = tree_.owner(source, page);
  if (tree_.dead(*at) || !tree_.admits(target, *at)) return missing;
  for (; at && tree_.page(*at, target) == kNoPage; at = tree_.parent(*at)) {
    if (!tree_.resident(*at, source)) return {};
    missing.push_back(*at);
  }
  std::ranges::reverse(missing);
  return missing;
}

std::optional<Place> Transfers::above_the_next(PoolId id) const {
  if (!pools_.at(id).shape.durable) return std::nullopt;  // others evict when they need a page
  for (PoolId above = 0; above < pools_.size(); ++above) {
    if (!pools_.alive(above) || pools_[above].shape.below != id) continue;
    const PagePool& from = pools_[above];
    const auto& queue = from.undemoted.empty() ? from.sent_back : from.undemoted;
    if (queue.empty() || !from.is(queue.front(), PageState::kResident)) continue;
    auto at = tree_.parent(tree_.owner(above, queue.front()));
    while (at && tree_.page(*at, id) == kNoPage) at = tree_.parent(*at);
    if (at) return at;
  }
  return std::nullopt;
}

// Adds the block of a page and the blocks before it that the target lacks, up to one that is
// refused: then it, and what is below it, stays where it is. Once refused, a block is refused till
// it is used again. Not added, and not refused: the plan or the target is full.
Transfers::Tried Transfers::demote(Plan& plan, PageId page, const How& how) {
  const PagePool& from = pools_.at(plan.source);
  const std::vector<Place> missing = missing_below(plan.source, plan.target, page);
  for (size_t i = 0; i < missing.size(); ++i) {
    const Place at = missing[i];
    if (plan.size() >= how.max_pages) return {};
    Tried tried{};
    if (how.judged && from[tree_.page(at, plan.source)].refused) {
      tried.refused = evictor_.worths_of(tree_[at.node].keys[at.offset]);
    } else if (const auto ends = how.judged ? end_of_path(plan, at, how) : std::nullopt) {
      tried = *ends;
    } else {
      tried = try_add(plan, at, how);
    }
    if (tried.refused) refuse(plan, std::span(missing).subspan(i), *tried.refused);
    if (!tried.added) return tried;
  }
  return {.added = true};
}

// Where a full target could evict nothing but the block that this one hangs on: no block is used
// more often than that one, so it is refused; not yet, while pages there are pinned or under way.
std::optional<Transfers::Tried> Transfers::end_of_path(const Plan& plan, Place at, const How& how) {
  const PagePool& target = pools_.at(plan.target);
  const PagePool::Counts& pages = target.counts();
  const auto above = tree_.parent(at);
  if (pages.free > (target.shape.durable ? how.ahead : 0) || !above) return std::nullopt;
  const Newcomer block = newcomer(at, plan.target);
  if (!evictor_.could_evict_only(*above, plan.target, block.tenant)) return std::nullopt;
  const auto worths = evictor_.worths(block, *above);
  if (!worths) return std::nullopt;
  const bool busy = pages.private_ + pages.in_flight + pages.pinned > 0;
  return Tried{.refused = busy ? std::nullopt : worths};
}

// Those that are not yet known to be refused.
void Transfers::refuse(const Plan& plan, std::span<const Place> blocks, const Worths& worths) {
  PagePool& from = pools_.at(plan.source);
  for (const Place at : blocks) {
    Page& page = from[tree_.page(at, plan.source)];
    if (page.refused) continue;
    page.refused = 1;
    evictor_.note_refusal(plan.target, tree_[at.node].keys[at.offset], worths);
    tree_.refresh(at.node);
  }
}

bool Transfers::insist(Place at, std::span<const PoolId> pools) {
  if (tree_.page(at, pools.back()) != kNoPage) return false;
  for (size_t tier = 0; tier + 1 < pools.size(); ++tier) {
    PagePool& in = pools_.at(pools[tier]);
    const PageId page = tree_.page(at, pools[tier]);
    if (page == kNoPage || tree_.resident(at, pools[tier + 1])) continue;
    in[page].insisted = 1;
    // what was sent back waits in its own queue, or it would put out what waits in the pool below
    if (in.is(page, PageState::kResident) && !in[page].sent_back) in.enqueue(page);
  }
  tree_.refresh(at.node);
  return true;
}

Transfers::Demotion Transfers::plan_demote(PoolId id, uint32_t max_pages, uint32_t ahead) {
  max_pages = std::min(max_pages, kPagesMax);
  PagePool& from = pools_.at(id);
  if (!from.shape.below || pools_.at(*from.shape.below).closed) return {};
  Plan plan{.source = id, .target = *from.shape.below};
  bool full = false;
  uint32_t refused = 0;
  for (auto* queue : {&from.undemoted, &from.sent_back}) {
    while (!full && !queue->empty() && plan.size() < max_pages && refused < kRefusalsMax) {
      const PageId page = queue->front();
      const Tried tried = demote(plan, page,
                                 {.sent_back = queue == &from.sent_back,
                                  .judged = !from[page].insisted,
                                  .ahead = ahead,
                                  .max_pages = max_pages});
      full = !tried.added && !tried.refused;
      refused += tried.refused.has_value();
      if (!full) from.dequeue(*queue);  // else it stays the first to be considered
    }
  }
  if (plan.empty()) return {.more = refused == kRefusalsMax};
  return {start(std::move(plan))};
}

// Blocks that a pool of the chain has and the pool below it lacks are queued for demotion again.
void Transfers::requeue(const Run& run, std::span<const PoolId> pools) {
  for (size_t tier = 0; tier + 1 < pools.size(); ++tier) {
    if (tree_.holds_all(run, pools[tier + 1])) continue;
    PagePool& from = pools_.at(pools[tier]);
    const std::span<const PageId> there = tree_.pages(run, pools[tier]);
    for (uint32_t i = 0; i < there.size(); ++i) {
      const bool lacking = tree_.page({run.node, run.offset + i}, pools[tier + 1]) == kNoPage;
      if (lacking && from.is(there[i], PageState::kResident)) from.enqueue(there[i]);
    }
    tree_.refresh(run.node);  // what was refused waits again
  }
}

bool Transfers::kept_out(PoolId id, PoolId above, PageId page) const {
  if (!pools_[above].is(page, PageState::kResident)) return false;
  const Place at = tree_.owner(above, page);
  if (tree_.dead(at) || tree_.page(at, id) != kNoPage || tree_.admits(id, at)) return false;
  return std::ranges::none_of(tree_[at.node].pools, [&](const Residency& in) {
    return in.pool < above && pools_.is_above(in.pool, id) && tree_.resident(at, in.pool);
  });
}

// The blocks of a slab go to free pages of other slabs. A page's generation goes along: it names
// the bytes that were written, and these stay the same.
std::optional<Transfer> Transfers::plan_move(PoolId id, uint32_t slab, uint32_t max_pages) {
  PagePool& in = pools_.at(id);
  if (in.closed || !in.is_closed(slab)) return std::nullopt;
  max_pages = std::min(max_pages, kPagesMax);
  Plan plan{.source = id, .target = id};
  const PageId first = slab * in.shape.pages_per_slab;
  for (PageId page = first; page < first + in.shape.pages_per_slab; ++page) {
    if (plan.size() == max_pages) break;
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
  if (plan.empty()) return std::nullopt;
  return start(std::move(plan));
}

// Returns the pages that its blocks have left. A block that somebody has pinned meanwhile stays.
std::vector<PageId> Transfers::end_move(const Plan& move, uint32_t done) {
  PagePool& in = pools_.at(move.source);
  std::vector<PageId> left;
  for (size_t i = 0; i < move.size(); ++i) {
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
      in[to].refused = in[from].refused;
      in[to].insisted = in[from].insisted;
      in.free(from);
      left.push_back(from);
    }
    tree_.refresh(node);
  }
  return left;
}

Transfers::Ended Transfers::complete(TransferId id, uint32_t done) {
  const auto found = open_.find(id);
  if (found == open_.end()) throw UnknownId("transfer " + std::to_string(id));
  if (done > found->second.plan.size()) {
    throw std::invalid_argument("done: more than the transfer has");
  }
  const auto [plan, broken] = std::move(found->second);
  open_.erase(found);
  if (broken) done = 0;
  Ended ended{.target = plan.target};
  const bool source_alive = pools_.alive(plan.source);
  if (plan.is_move()) {
    if (source_alive) ended.left = end_move(plan, done);
    return ended;
  }
  if (source_alive) {
    PagePool& source = pools_.at(plan.source);
    for (const PageId page : plan.source_pages) {
      source.unpin(page);
      tree_.refresh(source[page].node);
    }
  }
  if (!pools_.alive(plan.target)) return ended;
  const std::span pages(plan.target_pages);
  for (const PageId page : pages) in_flight_.erase(name_of(plan.target, page));
  for (const PageId page : pages.first(done)) arrive(plan.target, page);
  if (source_alive) pass_on(plan, done);
  ended.failed.assign(pages.begin() + done, pages.end());
  if (source_alive && pools_.at(plan.source).shape.below == plan.target) {
    for (const PageId page : std::span(plan.source_pages).subspan(done)) {
      pools_.at(plan.source).enqueue(page);
    }
  }
  return ended;
}

// Who insisted on a block that has come down insists on it there.
void Transfers::pass_on(const Plan& plan, uint32_t done) {
  PagePool &source = pools_.at(plan.source), &target = pools_.at(plan.target);
  if (source.shape.below != plan.target) return;
  for (uint32_t i = 0; i < done; ++i) {
    Page& page = source[plan.source_pages[i]];
    if (page.insisted && target.shape.below) target[plan.target_pages[i]].insisted = 1;
    page.insisted = 0;
  }
}

void Transfers::arrive(PoolId id, PageId page) {
  PagePool& target = pools_.at(id);
  target.move(page, PageState::kResident);
  target.unpin(page);
  const Place at = tree_.owner(id, page);
  tree_.arrive(at, id);
  const auto below = target.shape.below;
  if (below && tree_.page(at, *below) == kNoPage) target.enqueue(page);
  tree_.refresh(at.node);
}

void Transfers::free_failed(const Ended& ended) {
  for (size_t i = ended.failed.size(); i-- > 0;) {  // tail first: no block loses its parent
    pools_.at(ended.target).unpin(ended.failed[i]);
    evictor_.drop(tree_.owner(ended.target, ended.failed[i]), ended.target, Cause::kTransferFailed);
  }
}

void Transfers::pool_leaves(PoolId id) {
  for (auto& [transfer, open] : open_) {
    const Plan& plan = open.plan;
    if (plan.source != id && plan.target != id) continue;
    open.broken = true;
    if (plan.target != id) continue;
    for (const PageId page : plan.target_pages) in_flight_.erase(name_of(id, page));
  }
}

}  // namespace kvc2
