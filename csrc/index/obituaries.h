// The blocks that died last, and why. A block dies when its last page goes, in whatever pool. One
// that a pool refused is noted here at once: if nothing else is noted later, it died of that.
//
//     ring   [.. k7 k8 k9 | k2 k3 ..]     the newest death overwrites the oldest
//     cells  [  3     0   8  ..     ]     open addressing: key -> its place in the ring
//
// Costs: 40 bytes a death, for at most `capacity` deaths: 32 in the ring, which grows up to that,
// and two cells of 4, which are there from the start. record and find are O(1), and allocate
// nothing once the ring is full. A block that died twice is found by its last death.
// Knows nothing of the living: a block that came back is still found here.
// Not thread-safe: the index holds its lock.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "index/block_key.h"

namespace kvc2 {

enum class Cause : uint8_t {
  kEvicted,         // for room, or because somebody asked for it
  kLost,            // a fault took its page
  kSessionEnded,    // it was in the pool of a session that is over, and nowhere else
  kTransferFailed,  // its only page was being filled when the transfer failed
  kInvalidated,     // its namespace is retired
  kExpired,         // its time to live was over
  kNotAdmitted,     // a pool refused it, and no other kept it
};

struct Worths {  // of a block that was refused and of what would have been evicted for it
  float newcomer = 0, victim = 0;
};

struct Obituary {
  BlockKey key;
  uint32_t when;       // the second that Index::advance had told
  uint32_t pool : 24;  // that held its last page, or refused it
  uint32_t cause : 8;  // Cause
  Worths worths{};     // of kNotAdmitted
};

class Obituaries {
 public:
  explicit Obituaries(uint32_t capacity);

  void record(const Obituary& death);
  std::optional<Obituary> find(const BlockKey& key) const;  // its last death

  uint64_t deaths() const { return deaths_; }  // since the start, forgotten ones included
  uint32_t known() const { return static_cast<uint32_t>(ring_.size()); }
  size_t metadata_bytes() const;
  void check() const;

 private:
  static constexpr uint32_t kEmpty = 0xFFFFFFFF;

  size_t home(const BlockKey& key) const { return NameHash{}(key) & (cells_.size() - 1); }
  size_t cell_of(const BlockKey& key) const;  // its cell, or the free one for it
  void erase(size_t gap);

  uint32_t capacity_;
  std::vector<Obituary> ring_;
  std::vector<uint32_t> cells_;  // a power of two of them, at most half of them used
  uint64_t deaths_ = 0;
};

}  // namespace kvc2
