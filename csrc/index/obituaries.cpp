#include "index/obituaries.h"

#include <algorithm>
#include <bit>

#include "base/check.h"

namespace kvc2 {

Obituaries::Obituaries(uint32_t capacity)
    : capacity_(capacity), cells_(std::bit_ceil(size_t{2} * std::max(capacity, 1U)), kEmpty) {}

size_t Obituaries::cell_of(const BlockKey& key) const {
  size_t at = home(key);
  while (cells_[at] != kEmpty && ring_[cells_[at]].key != key) at = (at + 1) & (cells_.size() - 1);
  return at;
}

// What follows in the run moves into the gap, unless its home lies behind it.
void Obituaries::erase(size_t gap) {
  const size_t mask = cells_.size() - 1;
  for (size_t at = (gap + 1) & mask; cells_[at] != kEmpty; at = (at + 1) & mask) {
    const size_t from_home = (at - home(ring_[cells_[at]].key)) & mask;
    if (from_home < ((at - gap) & mask)) continue;
    cells_[gap] = cells_[at];
    gap = at;
  }
  cells_[gap] = kEmpty;
}

void Obituaries::record(const Obituary& death) {
  const uint64_t number = deaths_++;
  if (capacity_ == 0) return;
  const auto place = static_cast<uint32_t>(number % capacity_);
  if (place == ring_.size()) {
    ring_.push_back(death);
  } else {
    const size_t oldest = cell_of(ring_[place].key);
    if (cells_[oldest] == place) erase(oldest);  // else it has died again since
    ring_[place] = death;
  }
  cells_[cell_of(death.key)] = place;
}

std::optional<Obituary> Obituaries::find(const BlockKey& key) const {
  const uint32_t place = cells_[cell_of(key)];
  if (place == kEmpty) return std::nullopt;
  return ring_[place];
}

size_t Obituaries::metadata_bytes() const {
  return ring_.capacity() * sizeof(Obituary) + cells_.capacity() * sizeof(uint32_t);
}

void Obituaries::check() const {
  static_assert(sizeof(Obituary) == 32);
  size_t used = 0;
  for (size_t at = 0; at < cells_.size(); ++at) {
    if (cells_[at] == kEmpty) continue;
    ++used;
    KVC2_CHECK(cells_[at] < ring_.size() && cell_of(ring_[cells_[at]].key) == at,
               "obituaries: cell %zu is not found", at);
  }
  KVC2_CHECK(used <= ring_.size() && ring_.size() <= capacity_, "obituaries: %zu of %zu in cells",
             used, ring_.size());
}

}  // namespace kvc2
