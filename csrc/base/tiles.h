// AMX tiles, all of the full size: sixteen rows of 64 bytes. For files named *_amx.cpp only.
//
// _tile_dpbf16ps(c, a, b): c[i][j] += sum over k of a[i][2k] b[k][2j] + a[i][2k+1] b[k][2j+1].
// So a is sixteen rows of 32 bfloat16 as they lie in memory; b holds pairs (x[2k], x[2k+1]).
#pragma once

#include <immintrin.h>

#include "base/lanes.h"

namespace kvc2 {
namespace {

constexpr size_t kTileRowBytes = 64;
constexpr size_t kTilePairs = 16;  // of the summed dimension, in one tile

// What was stored before is in memory, for tiles to be loaded from: the compiler knows neither that
// _tile_loadd reads anything, nor that _tile_loadconfig reads more than its first eight bytes.
inline void tiles_read_memory(const void* what = nullptr) {
  asm volatile("" : : "r"(what) : "memory");
}

// Gives this thread its tiles, and releases them: while they are in use every switch of the
// thread saves 8 KiB.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    tiles_read_memory(&config);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Sixteen rows of `columns` bfloat16 (a multiple of 32; null: zeros) as b: [columns / 2][16] pairs.
inline void pack_pairs(const uint16_t* const (&rows)[kLanes], size_t columns, std::byte* pairs) {
  constexpr size_t kAhead = 4 * 2 * kLanes;  // sixteen streams are too many for the prefetcher
  for (size_t column = 0; column < columns; column += 2 * kLanes) {
    Lanes block[kLanes];
    for (size_t t = 0; t < kLanes; ++t) {
      if (rows[t] != nullptr) __builtin_prefetch(rows[t] + column + kAhead);
      block[t] = rows[t] == nullptr ? Lanes{} : load(rows[t] + column);
    }
    transpose(block);
    for (size_t i = 0; i < kLanes; ++i) store(pairs + (column / 2 + i) * kTileRowBytes, block[i]);
  }
}

}  // namespace
}  // namespace kvc2
