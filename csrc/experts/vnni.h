// Bytes and nibbles by vpdpbusd: four products of an unsigned and a signed byte, added exactly.
#pragma once

#include <immintrin.h>

#include "experts/packed_product.h"

namespace kvc2::experts {
namespace {

struct VnniBytes {
  static constexpr size_t kBytes = 64, kStepBytes = 4, kSteps = PackedHead::kPackedIn;
  using Sums = IntLanes;
  using Split = WordLanes;
  using Input = __m512i;

  static void put(const int8_t* q, std::byte* at) { std::memcpy(at, q, 4); }

  [[gnu::always_inline]] static Split split(WordLanes line) { return line; }

  [[gnu::always_inline]] static Input input(const std::byte* at) {
    int32_t four;
    std::memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
  }

  [[gnu::always_inline]] static Sums add(Sums sums, Split w, Input x) {
    return reinterpret_cast<IntLanes>(
        _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(w), x));
  }

  [[gnu::always_inline]] static Sums widened(Sums sums) { return sums; }
};

}  // namespace
}  // namespace kvc2::experts
