// What brings the blocks that a lease has matched into its pool.
#include <algorithm>

#include "index/leases.h"

namespace kvc2 {

Load Leases::next_load(LeaseId id, uint32_t max_pages) {
  const Lease& lease = get(id);
  max_pages = std::min(max_pages, Transfers::kPagesMax);
  const std::vector<PoolId> pools = pools_.chain(lease.pool);
  // Where the pool above the durable one is the lease's own, promote brings from the durable one.
  if (pools.size() < 3 || !pools_.at(pools.back()).shape.durable) return {};
  const PoolId target = pools[pools.size() - 2];
  if (pools_.at(target).closed) return {};
  Transfers::Plan plan{.source = pools.back(), .target = target};
  const auto last = cursor(lease);
  if (!last) return {};
  Place at = *last;
  const std::span memory(pools.begin(), pools.end() - 1);
  for (uint32_t block = lease.end(); block < lease.matched && plan.size() < max_pages; ++block) {
    const auto next = step(lease, at, block);
    if (!next) break;
    at = *next;
    const bool near = tree_.page(at, lease.pool) != kNoPage ||
                      std::ranges::any_of(memory, [&](PoolId p) { return tree_.resident(at, p); });
    if (near && plan.empty()) continue;
    if (near) break;
    const auto coming =
        std::ranges::find_if(memory, [&](PoolId p) { return tree_.page(at, p) != kNoPage; });
    if (coming != memory.end()) {
      if (!plan.empty()) break;
      return Wait{*transfers_.into(*coming, tree_.page(at, *coming))};
    }
    if (!tree_.resident(at, plan.source) || !transfers_.add(plan, at)) break;
  }
  if (plan.empty()) return {};
  return transfers_.start(std::move(plan));
}

std::optional<Transfer> Leases::promote(LeaseId id, uint32_t max_pages) {
  Lease& lease = get(id);
  PagePool& into = pools_.at(lease.pool);
  const auto below = into.shape.below;
  Transfers::Plan plan{.source = below.value_or(0), .target = lease.pool};
  const auto last = cursor(lease);
  if (!last) return std::nullopt;
  Place at = *last;
  while (const auto next = step(lease, at, lease.end())) {
    at = *next;
    if (tree_.page(at, lease.pool) != kNoPage) {
      if (!plan.empty()) break;
      hold(lease, {at.node, at.offset, 1});
      tree_.refresh(at.node);
      continue;
    }
    if (!below || plan.size() >= max_pages || !tree_.resident(at, *below)) break;
    if (!transfers_.add(plan, at)) break;
    const PageId page = plan.target_pages.back();
    into.pin(page);
    lease.held.push_back({page, page, lease.found[lease.end()]});
  }
  if (plan.empty()) return std::nullopt;
  Transfer transfer = transfers_.start(std::move(plan));
  lease.depends.push_back(transfer.id);
  return transfer;
}

}  // namespace kvc2
