// A number for each of many block keys: an open-addressing hash table in 256 shards.
//
// Why not std::unordered_map: it allocates for each key, which is most of the time of an acquire
// that misses 2,000 blocks. And when it grows, one call moves all keys: at a few million that is
// 100 ms, in which every other call waits for the index. Here a shard grows or shrinks alone, and
// moves 1/256 of the keys: 0.1 ms at two million.
// A key costs 20 bytes at 1/4 to 3/4 of a shard, 36 on average, after growing alone. Each call is
// O(1), on average two cells that lie side by side. Keys are compared whole.
// Not thread-safe: the index holds its lock.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "index/block_key.h"

namespace kvc2 {

class KeyTable {
 public:
  static constexpr uint32_t kAbsent = 0xFFFFFFFF;

  uint32_t get(const BlockKey& key) const;         // kAbsent if it is not there
  void put(const BlockKey& key, uint32_t number);  // in place of what was there; not kAbsent
  void erase(const BlockKey& key);                 // nothing if it is not there

  size_t size() const { return size_; }
  size_t metadata_bytes() const;
  void check() const;

 private:
  struct Cell {
    BlockKey key;
    uint32_t number = kAbsent;
  };
  struct Shard {
    std::vector<Cell> cells;  // a power of two of them; a key lies at its home or in the run after
    size_t used = 0;
  };

  Shard& shard(const BlockKey& key) { return shards_[key.back()]; }
  const Shard& shard(const BlockKey& key) const { return shards_[key.back()]; }
  static size_t home(const Shard& in, const BlockKey& key);
  static size_t find(const Shard& in, const BlockKey& key);  // its cell, or the free one for it
  static void resize(Shard& shard, size_t cells);

  std::array<Shard, 256> shards_;  // by the key's last byte
  size_t size_ = 0;
};

}  // namespace kvc2
