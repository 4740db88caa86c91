// Gather and scatter against a byte-by-byte reference, in exact allocations so that a sanitizer
// sees one byte too many, and the order in which scatter makes layers readable.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "base/thread_team.h"
#include "copy/pages.h"
#include "copy/stream.h"
#include "expect.h"

namespace {

using namespace kvc2;

void every_stream_copies_like_memcpy() {
  std::vector<copy::Stream> streams = {copy::stream_portable};
  if (cpu().isa >= Isa::kAvx2) streams.push_back(copy::stream_avx2);
  if (cpu().isa >= Isa::kAvx512) streams.push_back(copy::stream_avx512);
  for (const copy::Stream stream : streams) {
    for (size_t bytes = 0; bytes < 6000; bytes += bytes < 300 ? 1 : 97) {
      for (const size_t shift : {0, 1, 13, 63}) {
        std::vector<uint8_t> from(bytes + 3), to(bytes + shift + 1, 0xEE);
        for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint8_t>(i * 31 + 7);
        stream(to.data() + shift, from.data() + 3, bytes, from.data());
        EXPECT(bytes == 0 || std::memcmp(to.data() + shift, from.data() + 3, bytes) == 0);
        EXPECT(to.back() == 0xEE && (shift == 0 || to[shift - 1] == 0xEE));
      }
    }
  }
}

// Layers of two segments of unlike, unaligned sizes, pages strided apart.
struct Pool {
  Pool(size_t layers, size_t num_pages) {
    uint64_t offset = 5;
    for (size_t j = 0; j < 2 * layers; ++j) {
      const uint64_t bytes = 1500 + 333 * (j % 5);
      segments.push_back({offset, bytes + j % 3, bytes});
      offset += segments.back().stride * num_pages;
      payload_bytes += bytes;
    }
    data.resize(offset);
    for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
  }
  uint8_t* segment(size_t j, uint64_t page) {
    return data.data() + segments[j].offset + page * segments[j].stride;
  }
  std::vector<Segment> segments;
  std::vector<uint8_t> data;
  uint64_t payload_bytes = 0;
};

// Of so many layers with two segments each.
std::vector<uint32_t> pairs(size_t layers) {
  std::vector<uint32_t> ends;
  for (size_t layer = 0; layer < layers; ++layer) ends.push_back(2 * (layer + 1));
  return ends;
}

void gather_and_scatter_move_each_byte() {
  Pool pool(6, 10);
  const std::vector<uint32_t> pages = {9, 0, 4, 7};
  std::vector<uint64_t> offsets;
  for (uint64_t i = 0; i < pages.size(); ++i) offsets.push_back((3 - i) * pool.payload_bytes);
  const PageList list{pool.segments, pages, offsets};
  for (const size_t threads : {1, 3}) {
    ThreadTeam team(threads);
    std::vector<uint8_t> arena(pool.payload_bytes * pages.size());
    EXPECT(!outside(list, pool.data.size(), arena.size()));
    gather(team, list, {pool.data.data(), pool.data.size()}, {arena.data(), arena.size()});
    for (size_t i = 0; i < pages.size(); ++i) {
      const uint8_t* at = arena.data() + offsets[i];
      for (size_t j = 0; j < pool.segments.size(); at += pool.segments[j].bytes, ++j) {
        EXPECT(std::memcmp(at, pool.segment(j, pages[i]), pool.segments[j].bytes) == 0);
      }
    }
    const std::vector<uint8_t> before = pool.data;
    for (size_t j = 0; j < pool.segments.size(); ++j) {
      for (const uint32_t page : pages)
        std::memset(pool.segment(j, page), 0, pool.segments[j].bytes);
    }
    scatter(team, list, {arena.data(), arena.size()}, {pool.data.data(), pool.data.size()},
            pairs(6), [](size_t) {});
    EXPECT(pool.data == before);
  }
}

// A reader on another thread trusts the progress word as an engine does.
void a_reported_layer_is_readable() {
  Pool pool(40, 8);
  const std::vector<uint32_t> pages = {1, 2, 3, 5, 6, 7};
  std::vector<uint64_t> offsets;
  for (uint64_t i = 0; i < pages.size(); ++i) offsets.push_back(i * pool.payload_bytes);
  const PageList list{pool.segments, pages, offsets};
  std::vector<uint8_t> arena(pool.payload_bytes * pages.size(), 0xAB);
  ThreadTeam team(3);
  std::atomic<uint64_t> progress{0};
  std::vector<size_t> reports;
  std::vector<uint32_t> layer_ends;  // of one segment and of three, in turn
  for (uint32_t layer = 0; layer < 40; ++layer) {
    layer_ends.push_back(2 * (layer + 1) - (layer % 2 == 0));
  }
  std::thread reader([&] {
    size_t j = 0;
    for (uint64_t layer = 0; layer < 40; ++layer) {
      while (progress.load(std::memory_order_acquire) <= layer) std::this_thread::yield();
      for (; j < layer_ends[layer]; ++j) {
        for (const uint32_t page : pages) {
          const uint8_t* data = pool.segment(j, page);
          EXPECT(data[0] == 0xAB && data[pool.segments[j].bytes - 1] == 0xAB);
        }
      }
    }
  });
  scatter(team, list, {arena.data(), arena.size()}, {pool.data.data(), pool.data.size()},
          layer_ends, [&](size_t layers) {
            reports.push_back(layers);
            progress.store(layers, std::memory_order_release);
          });
  reader.join();
  EXPECT(reports.size() == 40);
  for (size_t i = 0; i < reports.size(); ++i) EXPECT(reports[i] == i + 1);
}

void what_lies_outside_is_named() {
  Pool pool(1, 4);
  const std::vector<uint32_t> pages = {3, 0};
  const std::vector<uint64_t> offsets = {0, pool.payload_bytes};
  const PageList list{pool.segments, pages, offsets};
  const size_t arena_bytes = 2 * pool.payload_bytes;
  const size_t pool_bytes = pool.data.size();
  // the last page ends where its bytes end, not where its stride does
  const size_t needed = pool_bytes - (pool.segments[1].stride - pool.segments[1].bytes);
  EXPECT(!outside(list, needed, arena_bytes));
  EXPECT(outside(list, needed - 1, arena_bytes).value_or("").starts_with("pages[0] = 3"));
  EXPECT(outside(list, pool_bytes, arena_bytes - 1).value_or("").starts_with("offsets[1]"));
  const std::vector<Segment> huge = {{UINT64_MAX - 10, 1, 20}, {0, UINT64_MAX / 2, 1}};
  for (size_t j = 0; j < huge.size(); ++j) {
    EXPECT(outside({std::span(huge).subspan(j, 1), pages, offsets}, pool_bytes, arena_bytes));
  }
  const std::vector<uint64_t> far = {0, UINT64_MAX - 1};
  EXPECT(outside({pool.segments, pages, far}, pool_bytes, arena_bytes));
}

void no_pages_still_report_every_layer() {
  Pool pool(3, 1);
  ThreadTeam team(1);
  size_t last = 0;
  scatter(team, {pool.segments, {}, {}}, {nullptr, 0}, {nullptr, 0}, pairs(3),
          [&](size_t layers) { last = layers; });
  EXPECT(last == 3);
}

}  // namespace

int main() {
  every_stream_copies_like_memcpy();
  gather_and_scatter_move_each_byte();
  a_reported_layer_is_readable();
  what_lies_outside_is_named();
  no_pages_still_report_every_layer();
  return failures == 0 ? 0 : 1;
}
