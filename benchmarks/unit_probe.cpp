// What the machine's memory and arithmetic units give one thread, compiled by unit_probe.py for the
// machine that it runs on. Nothing of csrc/. A unit that the machine lacks does 0 operations.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

namespace {
constexpr int kSums = 16;  // in flight at once, more than the latency of any unit

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl, Linux: x86/xstate

// Eight tiles of sixteen rows of 64 bytes, all zeros; false where the kernel refuses them.
bool open_tiles() {
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
  asm volatile("" : : "r"(&config) : "memory");  // the intrinsic tells of its first bytes only
  _tile_loadconfig(&config);
  return true;
}
#endif
}  // namespace

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

// Four sums of tiles in flight, of operands that stay where they are.
extern "C" double bf16_tiles(size_t rounds) {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
  if (!open_tiles()) return 0;
  for (size_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(rounds) * 4 * 2 * 16 * 16 * 32;
#else
  return 0.0 * static_cast<double>(rounds);
#endif
}

extern "C" double byte_tiles(size_t rounds) {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
  if (!open_tiles()) return 0;
  for (size_t i = 0; i < rounds; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 5, 6);
    _tile_dpbusd(2, 4, 7);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(rounds) * 4 * 2 * 16 * 16 * 64;
#else
  return 0.0 * static_cast<double>(rounds);
#endif
}
