// As in packed_avx2.cpp, with registers of 64 bytes.
#include <immintrin.h>

#include "experts/packed_product.h"

namespace kvc2::experts {
namespace {

struct Avx512Pairs {
  static constexpr size_t kBytes = 64;

  [[gnu::always_inline]] static IntLanes add(IntLanes sums, WordLanes a, WordLanes b) {
    return sums + reinterpret_cast<IntLanes>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a),
                                                               reinterpret_cast<__m512i>(b)));
  }
};

struct Avx512Nibbles {
  static constexpr size_t kBytes = 64, kStepBytes = 4, kSteps = 8;
  using Sums = __m512i;
  using Split = __m512i;
  using Input = __m512i;

  static void put(const int8_t* q, std::byte* at) { std::memcpy(at, q, 4); }

  [[gnu::always_inline]] static Split split(WordLanes line) {
    return reinterpret_cast<__m512i>(line);
  }

  [[gnu::always_inline]] static Input input(const std::byte* at) {
    int32_t four;
    std::memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
  }

  [[gnu::always_inline]] static Sums add(Sums sums, Split w, Input x) {
    return _mm512_add_epi16(sums, _mm512_maddubs_epi16(w, x));
  }

  [[gnu::always_inline]] static IntLanes widened(Sums sums) {
    return reinterpret_cast<IntLanes>(_mm512_madd_epi16(sums, _mm512_set1_epi16(1)));
  }
};

using Avx512 = PackedKernels<PairBytes<Avx512Pairs>, Avx512Nibbles, WideFp8<64>, WideFp8<64>, 4, 2>;

}  // namespace

const Kernels kAvx512Packed = {Avx512::linear, Avx512::ffn};

}  // namespace kvc2::experts
