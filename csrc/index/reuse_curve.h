// What caches of other sizes would have hit, learnt from the accesses of this one.
//
// In one sentence: *a sample of the blocks, in order of their last use: when a block is used again,
// the tokens of the blocks before it are the size of the smallest LRU cache that would have hit.*
//
//     last use   new ──────────────────────────────► old
//     sample     [k0 k1 k2]  [k5 k6]  [k3]   [k8 k9]           a path is used tail first, so its
//                 head ... tail                                head is newer than its tail
//     k3 comes back: tokens of k0 k1 k2 k5 k6 k3 / rate        its distance
//
// A cache that evicts the least recently used leaf hits exactly the blocks whose distance is within
// its capacity. Distances rise along a path, so these blocks are a leading run of it. Blocks are
// sampled by their key: a sample of whole paths, by their head, would not do, since a few roots
// carry most traffic. The method is SHARDS (Waldspurger et al., FAST'15) with a sample of fixed
// size: the sampling rate falls as more distinct blocks are seen. A few hot blocks may be in the
// sample, or not, by chance; so the difference between the accesses that the sample saw and those
// that it should have seen counts as hits of every capacity (SHARDS-adj).
//
// Costs: an access compares once a block, and notes the sampled blocks. `catch_up` learns from the
// notes later, when nobody waits: O(log kSampleMax) a sampled block (amortised: when the order is
// full it is packed). At most kBytesMax of memory. It does not know what a restart brought back, or
// eviction that is not LRU.
// Deterministic, not thread-safe: the index holds its lock.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <span>
#include <vector>

#include "index/block_key.h"

namespace kvc2 {

class ReuseCurve {
 public:
  static constexpr uint32_t kSampleMax = 8192;
  static constexpr size_t kWaitingMax = 16384;  // noted blocks; more are learnt at once
  static constexpr size_t kBytesMax = size_t{1} << 20;

  explicit ReuseCurve(uint32_t sample_max = kSampleMax);

  // A prompt of `tokens` tokens asks for the blocks of `path`, `page_size` tokens each.
  void access(std::span<const BlockKey> path, uint32_t page_size, uint64_t tokens);
  // A block that was computed and not asked for before; no change if it is known.
  void add(const BlockKey& key, uint32_t page_size);
  // Learn from the oldest access or addition that was only noted; false if there was none.
  bool catch_up();

  // The share of all tokens of prompts that a cache of `capacity` tokens would have had; of an
  // unlimited one for kNoLimit. 0 before the first access. Of what was caught up with.
  static constexpr uint64_t kNoLimit = ~uint64_t{0};
  double hit_rate(uint64_t capacity) const;

  uint64_t tokens() const { return tokens_; }
  double rate() const;
  size_t sampled() const { return sample_.size(); }
  size_t metadata_bytes() const;
  void check() const;

 private:
  static constexpr uint32_t kSteps = 16;  // of a distance, between two powers of two: 4 % wide
  static constexpr uint32_t kBuckets = 48 * kSteps;

  struct Block {
    uint32_t place;  // in order_, later is newer
    uint32_t tokens;
  };

  struct Noted {      // an access, or (not `asked`) an addition
    uint32_t blocks;  // its sampled ones, in hashes_
    uint32_t page_size;
    bool asked;
  };

  static uint64_t hash_of(const BlockKey& key);
  static uint32_t bucket_of(double distance);
  bool is_sampled(uint64_t hash) const { return hash < limit_; }
  uint64_t tokens_from(uint32_t place) const;  // of sampled blocks there and after it
  void change(uint32_t place, int64_t tokens);
  void note(std::span<const BlockKey> keys, uint32_t page_size, bool asked);
  void measure(uint64_t hash, uint32_t page_size);
  void touch(uint64_t hash, uint32_t page_size);
  void shrink();
  void pack();

  uint32_t sample_max_;
  uint64_t limit_ = ~uint64_t{0};     // hashes below it are sampled
  std::map<uint64_t, Block> sample_;  // by hash: the largest goes when the sample is full
  std::vector<uint32_t> order_;       // a Fenwick tree of tokens by place
  uint32_t next_place_ = 0;
  uint64_t sampled_tokens_ = 0;          // in order_
  std::deque<Noted> noted_;              // oldest first
  std::deque<uint64_t> hashes_;          // of all that is noted
  std::array<double, kBuckets> hits_{};  // estimated tokens by distance
  double hit_tokens_ = 0, seen_ = 0;     // estimated: that came back, that were asked for in blocks
  uint64_t asked_ = 0, tokens_ = 0;      // exact: in blocks, and of all prompts
};

}  // namespace kvc2
