// Sums of products in float32, of floats and of bfloat16, with the registers of any instruction
// set: the reference, and the kernel of sets without products of bfloat16. All add in one order:
// lane i of an output takes elements i, i + 16... of float32, and 2 i + 1, 2 i, 2 i + 33,
// 2 i + 32... of bfloat16.
#pragma once

#include <bit>

#include "experts/rows_product.h"

namespace kvc2::experts {
namespace {

// Of sixteen registers none is left for what the compiler would keep, and loading limits products
// for which it would load again.
constexpr bool kFewRegisters = kRegisterBytes < 64;

inline void load_once(Register& x) {
  if constexpr (kFewRegisters) asm("" : "+x"(x));
}
inline void load_anew() {
  if constexpr (kFewRegisters) asm volatile("" ::: "memory");
}

// kSums outputs (or parts of them) are kept in registers at once, of kTokensOfPanel tokens at most.
template <class T, size_t kTokensOfPanel, size_t kSums>
struct FloatDot {
  using Element = T;
  static constexpr size_t kTokens = kTokensOfPanel;
  static constexpr size_t kHalves = sizeof(float) / sizeof(T);  // of a step of x: odd, then even
  static constexpr size_t kStepBytes = kHalves * sizeof(Lanes);

  static void widen(const T* step, std::byte* panel) {
    for (size_t i = 0; i < kHalves * kRegisters; ++i) {
      const Register x = half_of(step, i / kRegisters, i % kRegisters);
      std::memcpy(panel + i * kRegisterBytes, &x, kRegisterBytes);
    }
  }

  template <size_t kCount, bool kFetch>
  static void multiply(const Sixteen<T>& rows, const std::byte* panel, Lanes (&outputs)[kTokens]) {
    Totals<kCount> totals = {};
    const size_t whole = rows.in / kStep<T>;
    // Few steps at a time: then all rows find them of the tokens in the first cache.
    const size_t pieces = divided_up(whole * kCount * kStepBytes, kCached);
    const size_t steps = divided_up(whole, std::max<size_t>(pieces, 1));
    for (size_t done = 0; done < whole; done += steps) {
      const size_t now = std::min(steps, whole - done);
      const std::byte* x = panel + done * kTokens * kStepBytes;
      for (size_t r = 0; r < rows.count; r += kRowsNow<kCount>) {
        const T* w[kRowsNow<kCount>];
        for (size_t j = 0; j < kRowsNow<kCount>; ++j) w[j] = rows.row(r + j) + done * kStep<T>;
        add<kCount, kFetch>(w, now, x, ahead<kCount>(rows, steps < whole, r, done, now), r, totals);
      }
    }
    if (rows.in > whole * kStep<T>) add_tails<kCount>(rows, panel, whole, totals);
    for (size_t t = 0; t < kCount; ++t) outputs[t] = sums(totals[t]);
  }

 private:
  // [tokens][rows], each in registers side by side.
  template <size_t kCount>
  using Totals = Register[kCount][kLanes][kRegisters];

  static constexpr size_t kCached = 20 * 1024;  // bytes of x: rows go through beside them

  template <size_t kCount>
  static constexpr size_t kRowsNow = std::min<size_t>(4, std::bit_floor(kSums / kCount));
  template <size_t kCount>
  static constexpr size_t kPartsNow =
      std::min<size_t>(kRegisters, std::bit_floor(kSums / (kCount * kRowsNow<kCount>)));

  // A register of a step of a row, as floats; of bfloat16 the odd elements or the even ones.
  static Register half_of(const T* step, size_t half, size_t part) {
    const auto* from = reinterpret_cast<const std::byte*>(step) + part * kRegisterBytes;
    if constexpr (kHalves == 1) {
      Register x;
      std::memcpy(&x, from, sizeof x);
      return x;
    } else {
      WordRegister pairs;
      std::memcpy(&pairs, from, sizeof pairs);
      return reinterpret_cast<Register>(half == 0 ? pairs & 0xffff0000u : pairs << 16);
    }
  }

  // What is fetched while rows from r on are multiplied: the rows behind them; or, where all
  // sixteen come again for later steps, so much of the next sixteen.
  template <size_t kCount>
  static const T* ahead(const Sixteen<T>& rows, bool again, size_t r, size_t done, size_t now) {
    constexpr size_t kRows = kRowsNow<kCount>;
    if (again) return rows.next + (done * kLanes + now * r) * kStep<T>;
    return r + kRows < kLanes ? rows.first + (r + kRows) * rows.in : rows.next;
  }

  template <size_t kCount, bool kFetch>
  static void add(const T* const (&w)[kRowsNow<kCount>], size_t steps, const std::byte* panel,
                  const T* ahead, size_t r, Totals<kCount>& totals) {
    add_parts<kCount, kFetch>(w, steps, panel, ahead, r, 0, totals);
    for (size_t p = kPartsNow<kCount>; p < kRegisters; p += kPartsNow<kCount>) {
      add_parts<kCount, false>(w, steps, panel, ahead, r, p, totals);
    }
  }

  template <size_t kCount>
  static void add_tails(const Sixteen<T>& rows, const std::byte* panel, size_t whole,
                        Totals<kCount>& totals) {
    for (size_t r = 0; r < rows.count; r += kRowsNow<kCount>) {
      const T* w[kRowsNow<kCount>];
      for (size_t j = 0; j < kRowsNow<kCount>; ++j) w[j] = rows.row(r + j);
      const Tails<T, kRowsNow<kCount>> tails(w, rows.in);
      add<kCount, false>(tails.rows, 1, panel + whole * kTokens * kStepBytes, nullptr, r, totals);
    }
  }

  // kPartsNow registers, from the p-th on, of the totals of rows from r on.
  template <size_t kCount, bool kFetch>
  static void add_parts(const T* const (&w)[kRowsNow<kCount>], size_t steps, const std::byte* panel,
                        const T* ahead, size_t r, size_t p, Totals<kCount>& totals) {
    constexpr size_t kRows = kRowsNow<kCount>, kParts = kPartsNow<kCount>;
    Register kept[kCount][kRows][kParts];
    for (size_t t = 0; t < kCount; ++t) {
      for (size_t j = 0; j < kRows; ++j) {
        for (size_t i = 0; i < kParts; ++i) kept[t][j][i] = totals[t][r + j][p + i];
      }
    }
    for (size_t s = 0; s < steps; ++s, panel += kTokens * kStepBytes) {
      if (kFetch) fetch<kRows>(ahead, s);
      add_step(w, s, panel, p, kept);
    }
    for (size_t t = 0; t < kCount; ++t) {
      for (size_t j = 0; j < kRows; ++j) {
        for (size_t i = 0; i < kParts; ++i) totals[t][r + j][p + i] = kept[t][j][i];
      }
    }
  }

  template <size_t kCount, size_t kRows, size_t kParts>
  static void add_step(const T* const (&w)[kRows], size_t s, const std::byte* panel, size_t p,
                       Register (&kept)[kCount][kRows][kParts]) {
#pragma GCC unroll 2
    for (size_t half = 0; half < kHalves; ++half) {
      if (kCount > 2) load_anew();  // the same rows for the other half
#pragma GCC unroll 4
      for (size_t i = 0; i < kParts; ++i) {
        Register rows[kRows];
#pragma GCC unroll 4
        for (size_t j = 0; j < kRows; ++j) rows[j] = half_of(w[j] + s * kStep<T>, half, p + i);
#pragma GCC unroll 8
        for (size_t t = 0; t < kCount; ++t) {
          Register x;
          const size_t at = t * kStepBytes + (half * kRegisters + p + i) * kRegisterBytes;
          std::memcpy(&x, panel + at, sizeof x);
          if (kRows > 1) load_once(x);
#pragma GCC unroll 4
          for (size_t j = 0; j < kRows; ++j) kept[t][j][i] += rows[j] * x;
        }
      }
    }
  }
};

// The kernels of both types with such registers.
template <size_t kTokens, size_t kSums>
struct FloatKernels {
  template <class T>
  using Product = RowsProduct<FloatDot<T, kTokens, kSums>>;

  static void linear(const Linear& call, Workspace& workspace) {
    call.type == Type::kFloat32 ? experts::linear<Product<float>>(call, workspace)
                                : experts::linear<Product<uint16_t>>(call, workspace);
  }

  static void ffn(const Ffn& call, Workspace& workspace) {
    call.type == Type::kFloat32 ? experts::ffn<Product<float>>(call, workspace)
                                : experts::ffn<Product<uint16_t>>(call, workspace);
  }

  static constexpr Kernels kernels = {linear, ffn};
};

}  // namespace
}  // namespace kvc2::experts
