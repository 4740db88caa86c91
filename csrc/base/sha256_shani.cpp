#include <immintrin.h>

#include "base/sha256_compress.h"

namespace kvc2::sha {
namespace {

inline __m128i words(const uint8_t* p) {
  const __m128i big_endian = _mm_set_epi64x(0x0C0D0E0F08090A0B, 0x0405060700010203);
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), big_endian);
}

// W[t..t+3] from the sixteen words before: `w` holds them as a ring of four vectors, and slot 0
// of the ring (t mod 4) is the oldest (FIPS 180-4, 6.2.2 step 1).
inline __m128i schedule(const __m128i* w, int group) {
  const __m128i oldest = w[group & 3], second = w[(group + 1) & 3];
  const __m128i third = w[(group + 2) & 3], newest = w[(group + 3) & 3];
  const __m128i with_sigma0 = _mm_sha256msg1_epu32(oldest, second);
  const __m128i seven_back = _mm_alignr_epi8(newest, third, 4);
  return _mm_sha256msg2_epu32(_mm_add_epi32(with_sigma0, seven_back), newest);
}

inline __m128i pack(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return _mm_set_epi32(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c),
                       static_cast<int>(d));
}

}  // namespace

// The instruction does two rounds on the words (a,b,e,f) and (c,d,g,h), and what was (a,b,e,f) is
// (c,d,g,h) after them; so four rounds bring both names back to their vectors.
void compress_shani(uint32_t state[8], const uint8_t* data, size_t blocks) {
  __m128i abef = pack(state[0], state[1], state[4], state[5]);
  __m128i cdgh = pack(state[2], state[3], state[6], state[7]);
  for (; blocks > 0; --blocks, data += kBlockBytes) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {
      w[group & 3] = group < 4 ? words(data + group * 16) : schedule(w, group);
      const __m128i constants =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(kRound + group * 4));
      const __m128i sum = _mm_add_epi32(w[group & 3], constants);
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0E));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  uint32_t feba[4], hgdc[4];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(feba), abef);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(hgdc), cdgh);
  state[0] = feba[3], state[1] = feba[2], state[4] = feba[1], state[5] = feba[0];
  state[2] = hgdc[3], state[3] = hgdc[2], state[6] = hgdc[1], state[7] = hgdc[0];
}

}  // namespace kvc2::sha
