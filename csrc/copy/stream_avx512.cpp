#include <immintrin.h>

#include "copy/stream.h"

namespace kvc2::copy {
namespace {

struct Vector {
  static void move1(uint8_t* to, const uint8_t* from) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  // four loads before the first store: a load that waits for memory must not wait for the one
  // before
  static void move4(uint8_t* to, const uint8_t* from) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
    const __m512i c = _mm512_loadu_si512(from + 128), d = _mm512_loadu_si512(from + 192);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 64), b);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 128), c);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 192), d);
  }
};

}  // namespace

void stream_avx512(uint8_t* to, const uint8_t* from, size_t bytes, const uint8_t* next) {
  stream<Vector>(to, from, bytes, next);
}

}  // namespace kvc2::copy
