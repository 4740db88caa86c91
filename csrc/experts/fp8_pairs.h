// fp8 by products of bfloat16 pairs: each code is a bfloat16, exactly.
#pragma once

#include <immintrin.h>

#include "experts/packed_product.h"

namespace kvc2::experts {
namespace {

struct Bf16Fp8 {
  static constexpr size_t kBytes = 64, kStepBytes = 8;
  static constexpr float kScale = 1;
  using Sums = Lanes;
  struct Split {
    __m512bh even, odd;  // of four values 0 and 2, 1 and 3
  };
  using Input = Split;

  static void put(const uint16_t* x, std::byte* at) {
    const uint16_t pairs[4] = {x[0], x[2], x[1], x[3]};
    std::memcpy(at, pairs, sizeof pairs);
  }

  [[gnu::always_inline]] static Split split(WordLanes line) {
    const auto codes = reinterpret_cast<__m512i>(line);
    return {value(_mm512_slli_epi16(codes, 8)), value(codes)};
  }

  [[gnu::always_inline]] static Input input(const std::byte* at) {
    int32_t pairs[2];
    std::memcpy(pairs, at, sizeof pairs);
    return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(pairs[0])),
            reinterpret_cast<__m512bh>(_mm512_set1_epi32(pairs[1]))};
  }

  [[gnu::always_inline]] static Sums add(Sums sums, const Split& w, const Input& x) {
    const __m512 even = _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), w.even, x.even);
    return reinterpret_cast<Lanes>(_mm512_dpbf16_ps(even, w.odd, x.odd));
  }

 private:
  // Of the upper bytes. Both formats have sign, exponent and mantissa in this order, with 4 and 8
  // bits of exponent (bias 7 and 127). With exponent 0 it is the mantissa times 2^-9, which the
  // table has.
  [[gnu::always_inline]] static __m512bh value(__m512i codes) {
    alignas(64) static constexpr uint16_t kSmall[32] = {0,      0x3b00, 0x3b80, 0x3bc0,
                                                        0x3c00, 0x3c20, 0x3c40, 0x3c60};
    const __m512i shifted =
        _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi16(0x07f0));
    const __m512i usual = _mm512_add_epi16(shifted, _mm512_set1_epi16(120 << 7));
    const __mmask32 small = _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x7800));
    const __m512i magnitude = _mm512_mask_permutexvar_epi16(
        usual, small, _mm512_srli_epi16(codes, 8), _mm512_load_si512(kSmall));
    // magnitude | codes & sign
    return reinterpret_cast<__m512bh>(_mm512_ternarylogic_epi32(
        magnitude, codes, _mm512_set1_epi16(static_cast<int16_t>(0x8000)), 0xf8));
  }
};

}  // namespace
}  // namespace kvc2::experts
