// Words that are pairs of bfloat16: what the products of bfloat16 take, in registers and in tiles.
// For files that are compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include "attention/flash.h"

namespace kvc2::attention {
namespace {

struct Pairs {
  using Element = uint16_t;
  static constexpr size_t kPack = 2;

  static Lanes words(const uint16_t* from, size_t count) {
    if (count == 2 * kLanes) return load(from);
    Lanes some = {};
    std::memcpy(&some, from, count * sizeof(uint16_t));
    return some;
  }

  static void turn(const uint16_t* const* keys, size_t at, size_t count, float* to) {
    Lanes block[kLanes];
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) block[i] = words(keys[i] + at, count);
    transpose(block);
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) store(to + i * kLanes, block[i]);
  }

  // The pairs (even[i], odd[i]) of 32 elements.
  static void interleave(Lanes even, Lanes odd, Lanes& first, Lanes& second) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const auto a = reinterpret_cast<__m512i>(even), b = reinterpret_cast<__m512i>(odd);
    first = reinterpret_cast<Lanes>(_mm512_permutex2var_epi16(a, low, b));
    second = reinterpret_cast<Lanes>(_mm512_permutex2var_epi16(a, high, b));
  }

  template <size_t count>
  static void values(const uint16_t* const* rows, size_t at, Lanes (&to)[count]) {
#pragma GCC unroll 8
    for (size_t v = 0; v < count; v += 2) {
      const size_t d = at + v * kLanes;
      interleave(load(rows[0] + d), load(rows[1] + d), to[v], to[v + 1]);
    }
  }
  template <size_t count>
  static void some(const uint16_t* const* rows, size_t at, size_t left, Lanes (&to)[count]) {
    static_assert(count == 2);
    const size_t some = std::min(left, 2 * kLanes);
    interleave(words(rows[0] + at, some), words(rows[1] + at, some), to[0], to[1]);
  }

  static void pack(Lanes weights, float* to) {
    const auto halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(weights));
    std::memcpy(to, &halves, sizeof halves);
  }
};

}  // namespace
}  // namespace kvc2::attention
