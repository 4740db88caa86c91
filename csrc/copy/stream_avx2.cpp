#include <immintrin.h>

#include "copy/stream.h"

namespace kvc2::copy {
namespace {

struct Vector {
  static __m256i load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static void store(uint8_t* to, __m256i value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), value);
  }
  static void move1(uint8_t* to, const uint8_t* from) {
    const __m256i a = load(from), b = load(from + 32);
    store(to, a);
    store(to + 32, b);
  }
  static void move4(uint8_t* to, const uint8_t* from) {
    __m256i lane[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) lane[i] = load(from + i * 32);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) store(to + i * 32, lane[i]);
  }
};

}  // namespace

void stream_avx2(uint8_t* to, const uint8_t* from, size_t bytes, const uint8_t* next) {
  stream<Vector>(to, from, bytes, next);
}

}  // namespace kvc2::copy
