#include <immintrin.h>

#include "base/xxh3_long.h"

namespace kvc2::xxh3 {
namespace {

struct Lanes {
  explicit Lanes(const uint64_t* acc) : value(_mm512_loadu_si512(acc)) {}
  // acc + swapped neighbours of the data + low half times high half of (data xor secret)
  void accumulate(const uint8_t* input, const uint8_t* secret) {
    const __m512i data = _mm512_loadu_si512(input);
    const __m512i key = _mm512_xor_si512(data, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    const __m512i swapped = _mm512_shuffle_epi32(data, _MM_PERM_BADC);
    value = _mm512_add_epi64(value, _mm512_add_epi64(product, swapped));
  }
  void scramble(const uint8_t* secret) {
    const __m512i prime = _mm512_set1_epi64(static_cast<int64_t>(kPrime32_1));
    const __m512i x = _mm512_xor_si512(_mm512_xor_si512(value, _mm512_srli_epi64(value, 47)),
                                       _mm512_loadu_si512(secret));
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), prime);
    value = _mm512_add_epi64(_mm512_mul_epu32(x, prime), _mm512_slli_epi64(high, 32));
  }
  void store(uint64_t* acc) const { _mm512_storeu_si512(acc, value); }
  __m512i value;
};

}  // namespace

void consume_avx512(uint64_t acc[8], const uint8_t* input, size_t bytes) {
  consume<Lanes>(acc, input, bytes);
}

}  // namespace kvc2::xxh3
