#include "index/key_table.h"

#include <utility>

#include "base/check.h"

namespace kvc2 {

// So few that a table of 1/256 of a request's keys in each shard neither grows nor shrinks.
constexpr size_t kFewestCells = 32;

// Two words: the == of an array of bytes is a call of memcmp.
static bool same(const BlockKey& one, const BlockKey& two) {
  uint64_t a[2], b[2];
  std::memcpy(a, one.data(), sizeof a);
  std::memcpy(b, two.data(), sizeof b);
  return ((a[0] ^ b[0]) | (a[1] ^ b[1])) == 0;
}

size_t KeyTable::home(const Shard& in, const BlockKey& key) {
  return NameHash{}(key) & (in.cells.size() - 1);
}

size_t KeyTable::find(const Shard& in, const BlockKey& key) {
  size_t at = home(in, key);
  while (in.cells[at].number != kAbsent && !same(in.cells[at].key, key)) {
    at = (at + 1) & (in.cells.size() - 1);
  }
  return at;
}

uint32_t KeyTable::get(const BlockKey& key) const {
  const Shard& in = shard(key);
  return in.used == 0 ? kAbsent : in.cells[find(in, key)].number;
}

void KeyTable::put(const BlockKey& key, uint32_t number) {
  Shard& in = shard(key);
  if (in.cells.empty()) in.cells.resize(kFewestCells);
  Cell* cell = &in.cells[find(in, key)];
  if (cell->number == kAbsent) {
    if (4 * (in.used + 1) > 3 * in.cells.size()) {
      resize(in, 2 * in.cells.size());
      cell = &in.cells[find(in, key)];
    }
    ++in.used;
    ++size_;
  }
  *cell = {key, number};
}

void KeyTable::erase(const BlockKey& key) {
  Shard& in = shard(key);
  if (in.used == 0) return;
  const size_t mask = in.cells.size() - 1;
  size_t gap = find(in, key);
  if (in.cells[gap].number == kAbsent) return;
  // What follows in the run moves into the gap, unless its home lies behind it.
  for (size_t at = (gap + 1) & mask; in.cells[at].number != kAbsent; at = (at + 1) & mask) {
    const size_t from_home = (at - home(in, in.cells[at].key)) & mask;
    if (from_home < ((at - gap) & mask)) continue;
    in.cells[gap] = in.cells[at];
    gap = at;
  }
  in.cells[gap] = Cell{};
  --in.used;
  --size_;
  if (in.cells.size() > kFewestCells && 8 * in.used < in.cells.size()) {
    resize(in, in.cells.size() / 2);
  }
}

void KeyTable::resize(Shard& shard, size_t cells) {
  const std::vector<Cell> old = std::exchange(shard.cells, std::vector<Cell>(cells));
  for (const Cell& cell : old) {
    if (cell.number != kAbsent) shard.cells[find(shard, cell.key)] = cell;
  }
}

size_t KeyTable::metadata_bytes() const {
  size_t bytes = 0;
  for (const Shard& each : shards_) bytes += each.cells.capacity() * sizeof(Cell);
  return bytes;
}

void KeyTable::check() const {
  size_t all = 0;
  for (size_t number = 0; number < shards_.size(); ++number) {
    const Shard& in = shards_[number];
    size_t used = 0;
    for (size_t at = 0; at < in.cells.size(); ++at) {
      if (in.cells[at].number == kAbsent) continue;
      ++used;
      KVC2_CHECK(in.cells[at].key.back() == number && find(in, in.cells[at].key) == at,
                 "key table: cell %zu of shard %zu is not found", at, number);
    }
    KVC2_CHECK(used == in.used && 4 * used <= 3 * in.cells.size(),
               "key table: shard %zu has %zu of %zu cells, counted %zu", number, in.used,
               in.cells.size(), used);
    all += used;
  }
  KVC2_CHECK(all == size_, "key table: %zu keys, counted %zu", size_, all);
}

}  // namespace kvc2
