// bfloat16 products by vdpbf16ps, which adds the products of a pair, the odd one first, to a float.
#include <immintrin.h>

#include "experts/rows_product.h"

namespace kvc2::experts {
namespace {

// Four tokens by four rows at a time, sixteen sums in registers.
struct Bf16Dot {
  using Element = uint16_t;
  static constexpr size_t kTokens = 4, kRows = 4, kStepBytes = 64;

  static void widen(const uint16_t* step, std::byte* panel) {
    std::memcpy(panel, step, kStepBytes);
  }

  template <size_t kCount, bool kFetch>
  static void multiply(const Sixteen<uint16_t>& rows, const std::byte* panel,
                       Lanes (&outputs)[kTokens]) {
    for (size_t block = 0; block < kTokens; ++block) {
      const size_t first = block * kRows;
      if (first >= rows.count) continue;
      const uint16_t* w[kRows];
      for (size_t r = 0; r < kRows; ++r) w[r] = rows.row(first + r);
      const uint16_t* ahead =
          first + kRows < kLanes ? rows.first + (first + kRows) * rows.in : rows.next;
      outputs[block] = four<kCount, kFetch>(w, rows.in, panel, ahead);
    }
    transpose_quarters(outputs);
  }

 private:
  // Outputs of kCount tokens and four rows, in lane 4 * token + row.
  template <size_t kCount, bool kFetch>
  static Lanes four(const uint16_t* const (&rows)[kRows], size_t in, const std::byte* panel,
                    const uint16_t* ahead) {
    __m512 totals[kCount][kRows] = {};
    const size_t whole = in / kStep<Element>;
    for (size_t s = 0; s < whole; ++s, panel += kTokens * kStepBytes) {
      __m512i w[kRows];
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) w[r] = _mm512_loadu_si512(rows[r] + s * kStep<Element>);
      if (kFetch) fetch<kRows>(ahead, s);
      add(w, panel, totals);
    }
    if (const size_t rest = in % kStep<Element>; rest > 0) {
      const auto mask = static_cast<__mmask32>((uint64_t{1} << rest) - 1);
      __m512i w[kRows];
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) {
        w[r] = _mm512_maskz_loadu_epi16(mask, rows[r] + whole * kStep<Element>);
      }
      add(w, panel, totals);
    }
    Lanes all[kLanes] = {};
#pragma GCC unroll 16
    for (size_t i = 0; i < kCount * kRows; ++i) {
      all[i] = reinterpret_cast<Lanes>(totals[i / kRows][i % kRows]);
    }
    return sums(all);
  }

  template <size_t kCount>
  static void add(const __m512i (&w)[kRows], const std::byte* panel,
                  __m512 (&totals)[kCount][kRows]) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kCount; ++t) {
      const __m512i x = _mm512_load_si512(panel + t * kStepBytes);
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) {
        totals[t][r] = _mm512_dpbf16_ps(totals[t][r], reinterpret_cast<__m512bh>(w[r]),
                                        reinterpret_cast<__m512bh>(x));
      }
    }
  }
};

void bf16_linear(const Linear& call, Workspace& workspace) {
  call.type == Type::kBfloat16 ? linear<RowsProduct<Bf16Dot>>(call, workspace)
                               : kAvx512Kernels.linear(call, workspace);
}

void bf16_ffn(const Ffn& call, Workspace& workspace) {
  call.type == Type::kBfloat16 ? ffn<RowsProduct<Bf16Dot>>(call, workspace)
                               : kAvx512Kernels.ffn(call, workspace);
}

}  // namespace

const Kernels kAvx512Bf16Kernels = {bf16_linear, bf16_ffn};

}  // namespace kvc2::experts
