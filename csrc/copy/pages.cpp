#include "copy/pages.h"

#include <emmintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <vector>

#include "base/check.h"
#include "copy/stream.h"

namespace kvc2 {
namespace {

// A piece of work is about this large: small enough to share out evenly, large enough that taking
// it and fencing it cost nothing beside copying it (some 10 us).
constexpr uint64_t kPieceBytes = 128 * 1024;

copy::Stream stream_here() {
  const Isa isa = copy_isa();
  if (isa >= Isa::kAvx512) return copy::stream_avx512;
  return isa >= Isa::kAvx2 ? copy::stream_avx2 : copy::stream_portable;
}

// Where each segment begins in a payload; one more entry for the end.
std::vector<uint64_t> payload_starts(std::span<const Segment> segments) {
  std::vector<uint64_t> starts(segments.size() + 1);
  for (size_t j = 0; j < segments.size(); ++j) starts[j + 1] = starts[j] + segments[j].bytes;
  return starts;
}

size_t pieces_grain(uint64_t payload_bytes, size_t segments) {
  const uint64_t mean = std::max<uint64_t>(payload_bytes / std::max<size_t>(segments, 1), 1);
  return static_cast<size_t>(std::max<uint64_t>(kPieceBytes / mean, 1));
}

// offset + times * stride + bytes, or nothing if that doesn't fit 64 bits
std::optional<uint64_t> end_of(const Segment& segment, uint64_t times) {
  uint64_t end = 0;
  if (__builtin_mul_overflow(times, segment.stride, &end) ||
      __builtin_add_overflow(end, segment.offset, &end) ||
      __builtin_add_overflow(end, segment.bytes, &end)) {
    return std::nullopt;
  }
  return end;
}

// Counts the pieces of each layer down and reports leading complete layers. Pieces are handed out
// in layer order, but the last of one layer may finish after the first of the next.
class LayerCount {
 public:
  LayerCount(std::span<const uint32_t> layer_ends, size_t pages, const LayersDone& done)
      : items_left_(layer_ends.size()), done_(done) {
    size_t begin = 0;
    for (size_t layer = 0; layer < layer_ends.size(); ++layer) {
      items_left_[layer].store((layer_ends[layer] - begin) * pages, std::memory_order_relaxed);
      begin = layer_ends[layer];
    }
  }

  // Items [begin, end) of one layer are stored and fenced.
  void finish(size_t layer, size_t items) {
    // acq_rel: who takes the count to zero has seen what the others of this layer stored
    if (items_left_[layer].fetch_sub(items, std::memory_order_acq_rel) == items) report();
  }

 private:
  void report() {
    const std::lock_guard lock(mutex_);
    while (reported_ < items_left_.size() &&
           items_left_[reported_].load(std::memory_order_acquire) == 0) {
      done_(++reported_);
    }
  }

  std::vector<std::atomic<size_t>> items_left_;
  const LayersDone& done_;
  std::mutex mutex_;
  size_t reported_ = 0;
};

}  // namespace

void copy::stream_portable(uint8_t* to, const uint8_t* from, size_t bytes, const uint8_t*) {
  std::memcpy(to, from, bytes);
}

Isa copy_isa() { return std::min(cpu().isa, Isa::kAvx512); }

std::optional<std::string> outside(const PageList& list, size_t pool_bytes, size_t arena_bytes) {
  uint64_t payload_bytes = 0;
  const auto last_page = std::max_element(list.pages.begin(), list.pages.end());
  for (size_t j = 0; j < list.segments.size(); ++j) {
    if (__builtin_add_overflow(payload_bytes, list.segments[j].bytes, &payload_bytes)) {
      return "segments[" + std::to_string(j) + "]: the payload is longer than 64 bits can say";
    }
    if (last_page == list.pages.end()) continue;
    const auto end = end_of(list.segments[j], *last_page);
    if (!end || *end > pool_bytes) {
      return "pages[" + std::to_string(last_page - list.pages.begin()) +
             "] = " + std::to_string(*last_page) + ": segments[" + std::to_string(j) +
             "] ends outside the pool of " + std::to_string(pool_bytes) + " bytes";
    }
  }
  for (size_t i = 0; i < list.offsets.size(); ++i) {
    if (list.offsets[i] > arena_bytes || arena_bytes - list.offsets[i] < payload_bytes) {
      return "offsets[" + std::to_string(i) + "] = " + std::to_string(list.offsets[i]) +
             ": a payload of " + std::to_string(payload_bytes) +
             " bytes ends outside the arena of " + std::to_string(arena_bytes) + " bytes";
    }
  }
  return std::nullopt;
}

void gather(ThreadTeam& team, const PageList& list, Memory<const uint8_t> pool,
            Memory<uint8_t> arena) {
  KVC2_CHECK(!outside(list, pool.bytes, arena.bytes), "gather outside its memory");
  const std::vector<uint64_t> starts = payload_starts(list.segments);
  const copy::Stream stream = stream_here();
  const size_t segments = list.segments.size();
  // items in the order (page, segment): the arena is written from front to back
  const size_t items = list.pages.size() * segments;
  const auto source = [&](size_t item) {
    const Segment& segment = list.segments[item % segments];
    return pool.data + segment.offset + list.pages[item / segments] * segment.stride;
  };
  const auto copy_items = [&](size_t begin, size_t end) {
    for (size_t item = begin; item < end; ++item) {
      const size_t i = item / segments, j = item % segments;
      stream(arena.data + list.offsets[i] + starts[j], source(item), list.segments[j].bytes,
             source(std::min(item + 1, items - 1)));
    }
    _mm_sfence();
  };
  team.parallel_for(items, pieces_grain(starts.back(), segments), copy_items);
}

void copy_each(ThreadTeam& team, std::span<const Piece> pieces) {
  std::vector<Piece> parts;
  for (const Piece& piece : pieces) {
    for (size_t done = 0; done < piece.bytes; done += kPieceBytes) {
      parts.push_back(
          {piece.to + done, piece.from + done, std::min<size_t>(kPieceBytes, piece.bytes - done)});
    }
  }
  const copy::Stream stream = stream_here();
  team.parallel_for(parts.size(), 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const Piece& next = parts[std::min(i + 1, parts.size() - 1)];
      stream(parts[i].to, parts[i].from, parts[i].bytes, next.from);
    }
    _mm_sfence();
  });
}

bool are_layer_ends(std::span<const uint32_t> layer_ends, size_t segments) {
  size_t last = 0;
  for (const uint32_t end : layer_ends) {
    if (end <= last) return false;
    last = end;
  }
  return last == segments && segments > 0;
}

void scatter(ThreadTeam& team, const PageList& list, Memory<const uint8_t> arena,
             Memory<uint8_t> pool, std::span<const uint32_t> layer_ends, const LayersDone& done) {
  const size_t segments = list.segments.size(), pages = list.pages.size();
  KVC2_CHECK(are_layer_ends(layer_ends, segments), "layers of %zu segments end elsewhere",
             segments);
  KVC2_CHECK(!outside(list, pool.bytes, arena.bytes), "scatter outside its memory");
  if (pages == 0) {
    for (size_t layer = 0; layer < layer_ends.size(); ++layer) done(layer + 1);
    return;
  }
  const std::vector<uint64_t> starts = payload_starts(list.segments);
  const copy::Stream stream = stream_here();
  LayerCount count(layer_ends, pages, done);
  // items in the order (segment, page): layer after layer
  const auto source = [&](size_t item) {
    return arena.data + list.offsets[item % pages] + starts[item / pages];
  };
  const auto copy_items = [&](size_t begin, size_t end) {
    for (size_t item = begin; item < end; ++item) {
      const size_t j = item / pages, i = item % pages;
      const Segment& segment = list.segments[j];
      stream(pool.data + segment.offset + list.pages[i] * segment.stride, source(item),
             segment.bytes, source(std::min(item + 1, segments * pages - 1)));
    }
    _mm_sfence();
  };
  team.parallel_for(
      segments * pages, pieces_grain(starts.back(), segments), [&](size_t begin, size_t end) {
        while (begin < end) {  // a piece may reach over the end of a layer
          const auto layer = std::upper_bound(layer_ends.begin(), layer_ends.end(), begin / pages);
          const size_t stop = std::min(end, *layer * pages);
          copy_items(begin, stop);
          count.finish(static_cast<size_t>(layer - layer_ends.begin()), stop - begin);
          begin = stop;
        }
      });
}

}  // namespace kvc2
