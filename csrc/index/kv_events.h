// What routers hear of the cache: which block has come to which tier, and which has gone.
// In one sentence: *a bounded queue of changes, in their order; where it overflows, all is said to
// be gone, and a scan tells anew what is there.*
//
//     stored, removed ──► [chunk][chunk][chunk] ──► take        the newest chunk is still filled
//                          more than bytes_max
//                              └──► tell_anew: [cleared], and a scan from the first page on
//
// A block is in a tier while it is resident in any of the tier's pools: it is stored there with the
// first, and removed with the last. A scan (telling.cpp) tells each resident page that it has not
// told, as a rule after the blocks before it. Meanwhile the tree goes on changing, so that while a
// scan runs, each page that becomes resident, or takes another's place, is told at once, whatever
// else the tier has. To be told twice changes nothing.
//
// Law, held against the oracle (tests/oracles/events_machine.py): who starts with nothing and
// applies all that was taken has, once nothing more is to be taken, exactly what is resident, by
// tier.
//
// Costs: some 120 bytes a change, and for a stored block its tokens; one look at a flag where it is
// off. A scan has a bit a page. Not thread-safe: the index holds its lock.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "index/block_key.h"
#include "index/page_pool.h"

namespace kvc2 {

enum class KvEventKind : uint8_t { kCleared, kStored, kRemoved };

// One block of a change.
struct KvBlock {
  Digest space;  // its namespace's name
  uint32_t page_size;
  bool opaque;
  BlockKey key;
  BlockKey parent;  // of the block before; zeros: it is the first of its path
  Block block;
};

// Changes, as arrays by change. Words are what names the block: of a stored one its tokens, of an
// opaque key, stored or removed, the KeyBlock.
struct KvEvents {
  std::vector<uint8_t> kinds, tiers, opaque;
  std::vector<uint32_t> page_sizes, words_of;  // words_of: how many of `words` each has
  std::vector<uint32_t> words;
  std::vector<Digest> namespaces, extras;  // extras: zeros where it has none
  std::vector<BlockKey> keys, parents;     // parents: zeros where it is a first block

  size_t size() const { return kinds.size(); }
  size_t bytes() const;
};

class KvEventQueue {
 public:
  static constexpr size_t kChunkEvents = 512, kChunkWords = 1 << 15;

  struct Scan {  // where the next page is to be looked at
    PoolId pool = 0;
    PageId page = 0;
    std::vector<std::vector<bool>> told{};  // by pool, page

    bool was_told(PoolId of, PageId at) const {
      return of < told.size() && at < told[of].size() && told[of][at];
    }
    void tell(PoolId of, PageId at);
  };

  // bytes_max 0: nothing is told.
  explicit KvEventQueue(size_t bytes_max = 0) : bytes_max_(bytes_max) {
    if (on()) append({}, 0, KvEventKind::kCleared);
  }

  bool on() const { return bytes_max_ > 0; }
  void stored(const KvBlock& block, uint8_t tier);
  void removed(const KvBlock& block, uint8_t tier);

  // Whoever listens has lost something, or begins: all is cleared, and told anew.
  void tell_anew();
  uint64_t overflows() const { return overflows_; }

  KvEvents take();  // the oldest chunk; an empty one where there is none
  bool empty() const { return chunks_.empty(); }
  // Whether one more block may be told with what is taken next, and nothing be dropped for it.
  bool has_room(const KvBlock& block) const;

  std::optional<Scan> scan;

 private:
  void append(const std::optional<KvBlock>& of, uint8_t tier, KvEventKind kind);
  bool full_chunk() const {
    return !empty() &&
           (chunks_.back().size() >= kChunkEvents || chunks_.back().words.size() >= kChunkWords);
  }

  size_t bytes_max_;
  size_t bytes_ = 0;  // of all chunks
  uint64_t overflows_ = 0;
  std::deque<KvEvents> chunks_;
};

}  // namespace kvc2
