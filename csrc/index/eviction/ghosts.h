// Which blocks a pool evicted lately: a 31-bit tag of each key and a flag, 4 bytes an entry. A
// wrong hit (1 in 2^28) makes a policy guess wrong, no more. Each set of eight entries is a queue,
// which forgets its oldest entry first.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "index/block_key.h"

namespace kvc2 {

class Ghosts {
 public:
  void resize(size_t entries) {
    sets_.assign((entries + kWays - 1) / kWays, Set{});
    counts_ = {0, 0};
  }

  void remember(const BlockKey& key, bool flag) {
    if (sets_.empty()) return;
    Set& set = sets_[NameHash{}(key) % sets_.size()];
    forget(set[kWays - 1]);
    std::ranges::rotate(set, set.end() - 1);
    set[0] = tag_of(key) << 1 | uint32_t{flag};
    ++counts_[flag];
  }

  // The flag of the key, which is forgotten now; none if the key is not remembered.
  std::optional<bool> take(const BlockKey& key) {
    if (sets_.empty()) return std::nullopt;
    Set& set = sets_[NameHash{}(key) % sets_.size()];
    const auto found =
        std::ranges::find_if(set, [&](uint32_t entry) { return entry >> 1 == tag_of(key); });
    if (found == set.end()) return std::nullopt;
    const bool flag = *found & 1;
    forget(*found);
    *found = 0;
    std::ranges::rotate(found, found + 1, set.end());
    return flag;
  }

  uint32_t count(bool flag) const { return counts_[flag]; }
  size_t metadata_bytes() const { return sets_.capacity() * sizeof(Set); }

 private:
  static constexpr size_t kWays = 8;
  using Set = std::array<uint32_t, kWays>;  // newest first; 0 where there is none

  static uint32_t tag_of(const BlockKey& key) {
    uint32_t word;
    std::memcpy(&word, key.data() + 8, sizeof word);
    return word >> 1 | 1;
  }

  void forget(uint32_t entry) {
    if (entry != 0) --counts_[entry & 1];
  }

  std::vector<Set> sets_;
  std::array<uint32_t, 2> counts_{};  // entries by flag
};

}  // namespace kvc2
