// Index: what brings a prefix nearer before somebody leases it.
#include <algorithm>

#include "index/index.h"

namespace kvc2 {

// No lease: what is planned is pinned by its transfer alone, and what came may be evicted again.
// Nobody computes what is missing, and a prefix that is brought nearer lives no longer for it.
Load Index::prefetch(uint32_t space, PoolId head, Tokens tokens, uint32_t max_pages, bool touches) {
  const Lock lock(mutex_);
  check_space(space, head);
  const size_t size = tree_.spaces[space].page_size;
  const std::vector<PoolId> pools = chain(head);
  const Found found = find(space, pools, tree_.find(space, tokens));
  if (touches) {
    const uint32_t stamp = tick();
    for (const Run& run : found.path) tree_.touch(run, stamp);
  }
  max_pages = std::min(max_pages, kTransferPages);
  OpenTransfer plan{};
  Place at{tree_.spaces[space].root, kBeforeFirst};
  for (size_t block = 0; block < found.tiers.size(); ++block) {
    const auto next = tree_.next(at, tokens.subspan(block * size, size));
    if (!next) break;  // evicted for those before it
    at = *next;
    const bool there = tree_.page(at, head) != kNoPage;
    if (there && plan.source_pages.empty()) continue;
    const auto from = std::ranges::find_if(pools, [&](PoolId p) { return tree_.resident(at, p); });
    if (there || from == pools.end()) break;
    const PoolId source = *from, target = *(from - 1);
    if (const PageId coming = tree_.page(at, target); coming != kNoPage) {
      if (!plan.source_pages.empty()) break;
      return Wait{*transfer_into(target, coming)};
    }
    if (plan.source_pages.empty()) plan = {.source = source, .target = target};
    if (plan.target != target || pool(target).closed) break;
    if (plan.source_pages.size() >= max_pages) break;
    if (!add(plan, at)) break;
  }
  if (plan.source_pages.empty()) return {};
  return start(std::move(plan));
}

}  // namespace kvc2
