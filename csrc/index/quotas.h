// How much of each tier each tenant may take, and how much it takes: the bytes and the blocks of
// the pages, resident or in flight, that its blocks have in all pools of the tier. A tenant that
// has no quota in a tier is not counted there. A tenant may be over its quota; `Index::trim` then
// evicts the tenant's own coldest blocks. O(log quotas) a call. Not thread-safe: the index holds
// its lock.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace kvc2 {

using TenantId = uint32_t;  // 0: no tenant, and no quota

struct Quota {
  uint64_t max_bytes = ~uint64_t{0}, max_blocks = ~uint64_t{0};
  uint64_t bytes = 0, blocks = 0;

  bool over() const { return bytes > max_bytes || blocks > max_blocks; }
  // Whether `pages` more pages would be too many.
  bool full(uint64_t pages, uint64_t page_bytes) const {
    return bytes + pages * page_bytes > max_bytes || blocks + pages > max_blocks;
  }
};

class Quotas {
 public:
  void set(TenantId tenant, uint8_t tier, uint64_t max_bytes, uint64_t max_blocks) {
    Quota& quota = quotas_[{tier, tenant}];
    quota.max_bytes = max_bytes;
    quota.max_blocks = max_blocks;
  }
  Quota* find(TenantId tenant, uint8_t tier) {
    const auto found = tenant == 0 ? quotas_.end() : quotas_.find({tier, tenant});
    return found == quotas_.end() ? nullptr : &found->second;
  }
  const Quota* find(TenantId tenant, uint8_t tier) const {
    const auto found = tenant == 0 ? quotas_.end() : quotas_.find({tier, tenant});
    return found == quotas_.end() ? nullptr : &found->second;
  }
  bool empty() const { return quotas_.empty(); }
  std::vector<TenantId> over(uint8_t tier) const {  // in the order of their numbers
    std::vector<TenantId> tenants;
    for (auto at = quotas_.lower_bound({tier, 0}); at != quotas_.end(); ++at) {
      if (at->first.first != tier) break;
      if (at->second.over()) tenants.push_back(at->first.second);
    }
    return tenants;
  }
  const std::map<std::pair<uint8_t, TenantId>, Quota>& all() const { return quotas_; }

 private:
  std::map<std::pair<uint8_t, TenantId>, Quota> quotas_;
};

}  // namespace kvc2
