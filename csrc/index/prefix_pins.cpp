#include "index/prefix_pins.h"

#include <algorithm>

#include "base/check.h"

namespace kvc2 {

static auto& of_kind(auto& counts, Pinned how) {
  return how == Pinned::kHard ? counts.hard : counts.soft;
}

void PrefixPins::count(OfPool& of, const Pin& pin) {
  for (const BlockKey& key : pin.keys) {
    if (of_kind(of.blocks[key], pin.how)++ > 0) continue;
    ++of_kind(of, pin.how);
    ++of_kind(of.spaces[pin.space], pin.how);
  }
}

void PrefixPins::discount(OfPool& of, const Pin& pin) {
  for (const BlockKey& key : pin.keys) {
    const auto found = of.blocks.find(key);
    if (--of_kind(found->second, pin.how) == 0) {
      --of_kind(of, pin.how);
      --of_kind(of.spaces.at(pin.space), pin.how);
    }
    if (found->second.soft + found->second.hard == 0) of.blocks.erase(found);
  }
  const auto space = of.spaces.find(pin.space);
  if (space->second.soft + space->second.hard == 0) of.spaces.erase(space);
}

bool PrefixPins::pin(PoolId pool, uint32_t space, std::vector<BlockKey>&& keys, Pinned how,
                     uint32_t most, uint32_t ends) {
  if (pool >= pools_.size()) pools_.resize(pool + 1);
  OfPool& of = pools_[pool];
  const BlockKey last = keys.back();
  const auto known = of.pins.find(last);
  if (known != of.pins.end()) discount(of, known->second);
  Pin pin{space, how, ends, std::move(keys)};
  count(of, pin);
  if (of_kind(of, how) > most) {
    discount(of, pin);
    if (known != of.pins.end()) count(of, known->second);
    return false;
  }
  if (known != of.pins.end()) ends_.erase({known->second.ends, pool, last});
  if (ends > 0) ends_.insert({ends, pool, last});
  of.pins.insert_or_assign(last, std::move(pin));
  return true;
}

bool PrefixPins::stronger(PoolId pool, const BlockKey& last, Pinned how, uint32_t ends) const {
  if (pool >= pools_.size()) return false;
  const auto found = pools_[pool].pins.find(last);
  if (found == pools_[pool].pins.end()) return false;
  const Pin& pin = found->second;
  if (pin.how != how) return pin.how > how;
  return pin.ends == 0 || (ends > 0 && pin.ends >= ends);
}

uint32_t PrefixPins::unpin(PoolId pool, const BlockKey& last) {
  if (pool >= pools_.size()) return 0;
  const auto found = pools_[pool].pins.find(last);
  if (found == pools_[pool].pins.end()) return 0;
  const auto blocks = static_cast<uint32_t>(found->second.keys.size());
  ends_.erase({found->second.ends, pool, last});
  discount(pools_[pool], found->second);
  pools_[pool].pins.erase(found);
  return blocks;
}

std::vector<BlockKey> PrefixPins::advance(uint32_t now) {
  std::vector<BlockKey> blocks;
  while (!ends_.empty() && std::get<0>(*ends_.begin()) <= now) {
    const auto [ends, pool, last] = *ends_.begin();
    const Pin& pin = pools_[pool].pins.at(last);
    blocks.insert(blocks.end(), pin.keys.begin(), pin.keys.end());
    unpin(pool, last);
  }
  return blocks;
}

void PrefixPins::forget_pool(PoolId pool) {
  if (pool >= pools_.size()) return;
  for (const auto& [last, pin] : pools_[pool].pins) ends_.erase({pin.ends, pool, last});
  pools_[pool] = {};
}

void PrefixPins::forget_space(uint32_t space) {
  for (PoolId pool = 0; pool < pools_.size(); ++pool) {
    std::erase_if(pools_[pool].pins, [&](const auto& each) {
      const auto& [last, pin] = each;
      if (pin.space != space) return false;
      ends_.erase({pin.ends, pool, last});
      discount(pools_[pool], pin);
      return true;
    });
  }
}

bool PrefixPins::of_space(uint32_t space) const {
  return std::ranges::any_of(pools_, [&](const OfPool& of) {
    return std::ranges::any_of(of.pins,
                               [&](const auto& each) { return each.second.space == space; });
  });
}

uint32_t PrefixPins::blocks(PoolId pool, Pinned how) const {
  return pool < pools_.size() ? of_kind(pools_[pool], how) : 0;
}

uint32_t PrefixPins::blocks(PoolId pool, Pinned how, uint32_t space) const {
  if (pool >= pools_.size()) return 0;
  const auto found = pools_[pool].spaces.find(space);
  return found == pools_[pool].spaces.end() ? 0 : of_kind(found->second, how);
}

size_t PrefixPins::metadata_bytes() const {
  size_t bytes = pools_.capacity() * sizeof(OfPool);
  constexpr size_t kLink = 2 * sizeof(void*);  // of a hash map's entry
  bytes += ends_.size() * (sizeof(*ends_.begin()) + 2 * kLink);
  for (const OfPool& of : pools_) {
    bytes += of.blocks.size() * (sizeof(BlockKey) + sizeof(Counts) + kLink);
    bytes += of.spaces.size() * (sizeof(uint32_t) + sizeof(Counts) + kLink);
    for (const auto& [last, pin] : of.pins) {
      bytes += sizeof(BlockKey) + sizeof(Pin) + kLink + pin.keys.capacity() * sizeof(BlockKey);
    }
  }
  return bytes;
}

}  // namespace kvc2
