#include <immintrin.h>

#include "base/xxh3_long.h"

namespace kvc2::xxh3 {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// acc + swapped neighbours of the data + low half times high half of (data xor secret)
inline __m256i mixed(__m256i acc, __m256i data, __m256i secret) {
  const __m256i value = _mm256_xor_si256(data, secret);
  const __m256i product = _mm256_mul_epu32(value, _mm256_srli_epi64(value, 32));
  const __m256i swapped = _mm256_shuffle_epi32(data, 0x4E);
  return _mm256_add_epi64(acc, _mm256_add_epi64(product, swapped));
}

inline __m256i scrambled(__m256i acc, __m256i secret) {
  const __m256i prime = _mm256_set1_epi64x(static_cast<int64_t>(kPrime32_1));
  const __m256i x = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), secret);
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
}

struct Lanes {
  explicit Lanes(const uint64_t* acc) : low(load(acc)), high(load(acc + 4)) {}
  void accumulate(const uint8_t* input, const uint8_t* secret) {
    low = mixed(low, load(input), load(secret));
    high = mixed(high, load(input + 32), load(secret + 32));
  }
  void scramble(const uint8_t* secret) {
    low = scrambled(low, load(secret));
    high = scrambled(high, load(secret + 32));
  }
  void store(uint64_t* acc) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 4), high);
  }
  __m256i low, high;
};

}  // namespace

void consume_avx2(uint64_t acc[8], const uint8_t* input, size_t bytes) {
  consume<Lanes>(acc, input, bytes);
}

}  // namespace kvc2::xxh3
