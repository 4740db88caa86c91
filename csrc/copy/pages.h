// Copies between an engine's layer-major pool and block-contiguous payloads. Knows segments and
// bytes, never heads or dtypes. Not responsible for headers, nor for who may touch a page.
//
//   segment j of page p:      pool[segments[j].offset + p * segments[j].stride ; segments[j].bytes]
//   segment j of payload i:   arena[offsets[i] + sum of bytes of segments before j]
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>

#include "base/cpu.h"
#include "base/thread_team.h"

namespace kvc2 {

// Row of the [s, 3] array that describes a layout.
struct Segment {
  uint64_t offset, stride, bytes;
};

template <class Byte>
struct Memory {
  Byte* data;
  size_t bytes;
};

// Which pages, and where their payloads lie. Pages and payloads that are written to must not
// overlap one another: two threads would write there.
struct PageList {
  std::span<const Segment> segments;
  std::span<const uint32_t> pages;
  std::span<const uint64_t> offsets;  // as many as pages
};

// What would lie outside the pool or the arena, in words, or nothing.
std::optional<std::string> outside(const PageList& list, size_t pool_bytes, size_t arena_bytes);

// Pages out of the pool. Nothing may be outside().
void gather(ThreadTeam& team, const PageList& list, Memory<const uint8_t> pool,
            Memory<uint8_t> arena);

// Told, in order, that the first `layers` layers of all pages are in the pool and visible to any
// thread that synchronises with this call; from any thread of the team, one call at a time.
using LayersDone = std::function<void(size_t layers)>;

// Whether layers end after these many segments: rising, from 1 on, the last of them all `segments`.
bool are_layer_ends(std::span<const uint32_t> layer_ends, size_t segments);

// Payloads into the pool, in the order of layers, which end where layer_ends says. Nothing may be
// outside().
void scatter(ThreadTeam& team, const PageList& list, Memory<const uint8_t> arena,
             Memory<uint8_t> pool, std::span<const uint32_t> layer_ends, const LayersDone& done);

// One contiguous copy; none of a list may overlap what another one writes.
struct Piece {
  uint8_t* to;
  const uint8_t* from;
  size_t bytes;
};

// Copies that have nothing in common but their caller, shared out by their bytes.
void copy_each(ThreadTeam& team, std::span<const Piece> pieces);

// The instruction set that all three use on this machine.
Isa copy_isa();

}  // namespace kvc2
