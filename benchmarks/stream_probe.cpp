// The limit that page copies are compared with: one plain loop of non-temporal stores, compiled by
// page_copy.py for the machine that it runs on. Nothing of csrc/.
#include <immintrin.h>

#include <cstddef>

// Both ends at multiples of 64; so is `bytes`.
extern "C" void stream_copy(char* to, const char* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) {
    _mm_prefetch(from + i + 2048, _MM_HINT_T0);
#ifdef __AVX512F__
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i),
                        _mm512_load_si512(reinterpret_cast<const __m512i*>(from + i)));
#else
    for (size_t half = 0; half < 64; half += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + half),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(from + i + half)));
    }
#endif
  }
  _mm_sfence();
}
