#include "index/eviction/policy.h"

namespace kvc2 {

std::optional<EvictionOrder::Entry> EvictionOrder::first() const {
  if (order_.empty()) return std::nullopt;
  return *order_.begin();
}

std::optional<EvictionOrder::Entry> EvictionOrder::oldest(uint32_t queue, uint32_t stamp) const {
  if (order_.empty()) return std::nullopt;
  const auto standing = static_cast<uint8_t>(order_.begin()->rank >> 56);
  const auto found = order_.lower_bound({rank_in(standing, {queue, stamp}), 0});
  if (found == order_.end() || found->rank > rank_in(standing, {queue, 0xFFFFFFFF})) {
    return std::nullopt;
  }
  return *found;
}

}  // namespace kvc2
