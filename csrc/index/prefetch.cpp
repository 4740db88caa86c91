// What brings a prefix nearer before anybody leases it.
#include <algorithm>

#include "index/transfers.h"

namespace kvc2 {

// There is no lease: only the transfer pins what is planned, and what has come may be evicted
// again. No request computes the missing blocks meanwhile, and no block lives longer since it is
// prefetched.
Load Transfers::prefetch(const Found& found, std::span<const PoolId> pools, const Content& prefix,
                         uint32_t max_pages) {
  const size_t size = tree_.spaces[found.space].page_size;
  max_pages = std::min(max_pages, kPagesMax);
  Plan plan{};
  Place at{tree_.spaces[found.space].root, kBeforeFirst};
  for (size_t block = 0; block < found.tiers.size(); ++block) {
    const auto next = tree_.next(at, prefix.block(block, size));
    if (!next) break;  // evicted for those before it
    at = *next;
    const bool there = tree_.page(at, pools[0]) != kNoPage;
    if (there && plan.empty()) continue;
    const auto from = std::ranges::find_if(pools, [&](PoolId p) { return tree_.resident(at, p); });
    if (there || from == pools.end()) break;
    const PoolId source = *from, target = *(from - 1);
    if (const PageId coming = tree_.page(at, target); coming != kNoPage) {
      if (!plan.empty()) break;
      return Wait{*into(target, coming)};
    }
    if (plan.empty()) plan = {.source = source, .target = target};
    if (plan.target != target || pools_.at(target).closed) break;
    if (plan.size() >= max_pages) break;
    if (!offer(plan, at)) break;
  }
  if (plan.empty()) return {};
  return start(std::move(plan));
}

}  // namespace kvc2
