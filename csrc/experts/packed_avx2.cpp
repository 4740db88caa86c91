// Bytes by vpmaddwd, products of pairs of 16 bits. Nibbles by vpmaddubsw, products of an unsigned
// and a signed byte whose pairs are added in 16 bits: eight times 2 * 15 * 127 fit.
#include <immintrin.h>

#include "experts/packed_product.h"

namespace kvc2::experts {
namespace {

using Ints = Registers<32>::Ints;
using Words = Registers<32>::Words;

struct Avx2Pairs {
  static constexpr size_t kBytes = 32;

  [[gnu::always_inline]] static Ints add(Ints sums, Words a, Words b) {
    return sums + reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a),
                                                           reinterpret_cast<__m256i>(b)));
  }
};

struct Avx2Nibbles {
  static constexpr size_t kBytes = 32, kStepBytes = 4, kSteps = 8;
  using Sums = __m256i;
  using Split = __m256i;
  using Input = __m256i;

  static void put(const int8_t* q, std::byte* at) { std::memcpy(at, q, 4); }

  [[gnu::always_inline]] static Split split(Words line) { return reinterpret_cast<__m256i>(line); }

  [[gnu::always_inline]] static Input input(const std::byte* at) {
    int32_t four;
    std::memcpy(&four, at, sizeof four);
    return _mm256_set1_epi32(four);
  }

  [[gnu::always_inline]] static Sums add(Sums sums, Split w, Input x) {
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x));
  }

  [[gnu::always_inline]] static Ints widened(Sums sums) {
    return reinterpret_cast<Ints>(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
  }
};

using Avx2 = PackedKernels<PairBytes<Avx2Pairs>, Avx2Nibbles, WideFp8<32>, WideFp8<32>, 4, 1>;

}  // namespace

const Kernels kAvx2Packed = {Avx2::linear, Avx2::ffn};

}  // namespace kvc2::experts
