// What the machine's memory and arithmetic units give one thread, compiled by unit_probe.py for the
// machine that it runs on. Nothing of csrc/. A unit that the machine lacks does 0 operations.
#include <immintrin.h>

#include <cstddef>

namespace {
constexpr int kSums = 16;  // in flight at once, more than the latency of any unit
}

// Reads `bytes` (a multiple of 64 x streams) as 1, 2, 4 or 8 streams, each `ahead` bytes ahead.
extern "C" void read_streams(const char* from, size_t bytes, int streams, size_t ahead) {
  const size_t part = bytes / static_cast<size_t>(streams);
  for (size_t i = 0; i < part; i += 64) {
    for (int s = 0; s < streams; ++s) {
      const char* line = from + static_cast<size_t>(s) * part + i;
      if (ahead > 0) _mm_prefetch(line + ahead, _MM_HINT_T0);
#ifdef __AVX512F__
      __m512i x = _mm512_load_si512(reinterpret_cast<const __m512i*>(line));
      asm volatile("" : "+v"(x));  // read, and nothing done with it
#else
      for (int half = 0; half < 64; half += 16) {
        __m128i x = _mm_load_si128(reinterpret_cast<const __m128i*>(line + half));
        asm volatile("" : "+x"(x));
      }
#endif
    }
  }
}

// Each returns the operations done, a multiplication and an addition counted as two.
extern "C" double bf16_products(size_t rounds) {
#ifdef __AVX512BF16__
  __m512 sums[kSums] = {};
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], ones, ones);
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) asm volatile("" : "+v"(sums[j]));
  }
  return static_cast<double>(rounds) * kSums * 64;
#else
  return 0.0 * static_cast<double>(rounds);
#endif
}

extern "C" double byte_products(size_t rounds) {
#ifdef __AVX512VNNI__
  __m512i sums[kSums] = {};
  const __m512i ones = _mm512_set1_epi8(1);
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_dpbusd_epi32(sums[j], ones, ones);
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) asm volatile("" : "+v"(sums[j]));
  }
  return static_cast<double>(rounds) * kSums * 128;
#else
  return 0.0 * static_cast<double>(rounds);
#endif
}
