// The product with lanes along `in`: four token rows by four weight rows at a time, each of the
// sixteen outputs in a vector of its own, whose lanes are added at the end. The order of a sum
// depends on `in` alone. One token reads the weights as fast as memory gives them; many are bound
// by arithmetic, since each line from the cache is used four times.
//
// A `Dot` supplies:
//
//   Element, kStepBytes                       of x and w; what a panel holds of one token and step
//   widen(x, step)                            a step of a row (64 bytes of it) into a panel
//   multiply<kCount, kFetch>(rows, in, panel, ahead)
//       outputs of kCount tokens and four weight rows, in lane 4 * token + row; fetches as many
//       bytes from `ahead` as the rows have
#pragma once

#include <bit>

#include "experts/grouped.h"

namespace kvc2::experts {
namespace {

constexpr size_t kRows = 4;

// A step is a cache line of a weight row.
template <class T>
constexpr size_t kStep = 64 / sizeof(T);

// Of four rows, what lies behind the whole steps, with zeros behind it.
template <class T>
struct Tails {
  Tails(const T* const (&from)[kRows], size_t in) {
    const size_t whole = in / kStep<T> * kStep<T>;
    for (size_t r = 0; r < kRows; ++r) {
      std::memcpy(data[r], from[r] + whole, (in - whole) * sizeof(T));
      rows[r] = data[r];
    }
  }
  alignas(64) T data[kRows][kStep<T>] = {};
  const T* rows[kRows];
};

template <class Dot>
class RowsProduct {
 public:
  using Element = typename Dot::Element;
  using T = Element;
  static constexpr size_t kTokens = 4;

  RowsProduct(const Weight& weight, size_t in) : weight_(weight), in_(in) {}

  // A panel is [steps][4 tokens][kStepBytes].
  size_t panel_bytes() const { return divided_up(in_, kStep<T>) * kTokens * Dot::kStepBytes; }

  void pack(const T* const (&rows)[kTokens], std::byte* panel) const {
    for (size_t k = 0; k < in_; k += kStep<T>) {
      const size_t count = std::min(kStep<T>, in_ - k);
      for (size_t t = 0; t < kTokens; ++t, panel += Dot::kStepBytes) {
        alignas(64) T step[kStep<T>] = {};
        if (rows[t] != nullptr) std::memcpy(step, rows[t] + k, count * sizeof(T));
        Dot::widen(step, panel);
      }
    }
  }

  WeightRows<T> rows(const Pick& pick) const { return {weight_, pick}; }

  class Multiplier {
   public:
    template <class Epilogue>
    void run(const WeightRows<T>& rows, const Panels& panels, const Epilogue& epilogue) {
      const size_t in = rows.in;
      // Later panels find the rows in the cache.
      const size_t full = panels.tokens / kTokens, rest = panels.tokens % kTokens;
      if (full > 0) one<kTokens, true>(rows, in, panels.at(0), 0, epilogue);
      for (size_t p = 1; p < full; ++p) one<kTokens, false>(rows, in, panels.at(p), p, epilogue);
      if (rest > 0 && full > 0) some<false>(rest, rows, in, panels.at(full), full, epilogue);
      if (rest > 0 && full == 0) some<true>(rest, rows, in, panels.at(0), 0, epilogue);
    }

   private:
    template <bool kFetch, class Epilogue>
    static void some(size_t count, const WeightRows<T>& rows, size_t in, const std::byte* panel,
                     size_t index, const Epilogue& epilogue) {
      if (count == 1) one<1, kFetch>(rows, in, panel, index, epilogue);
      if (count == 2) one<2, kFetch>(rows, in, panel, index, epilogue);
      if (count == 3) one<3, kFetch>(rows, in, panel, index, epilogue);
    }

    template <size_t kCount, bool kFetch, class Epilogue>
    static void one(const WeightRows<T>& rows, size_t in, const std::byte* panel, size_t index,
                    const Epilogue& epilogue) {
      Lanes first[kTokens], second[kTokens];
      const T* next = rows.first + kLanes * in;
      sixteen<kCount, kFetch>(rows.first, rows.first_count, in, panel, rows.second, first);
      sixteen<kCount, kFetch>(rows.second, rows.second_count, in, panel, next, second);
      epilogue(index, first, second);
    }

    // Up to sixteen rows from w on; `next` is what will be read after them.
    template <size_t kCount, bool kFetch>
    static void sixteen(const T* w, size_t count, size_t in, const std::byte* panel, const T* next,
                        Lanes (&outputs)[kTokens]) {
      for (size_t block = 0; block < kTokens; ++block) {
        const size_t first = block * kRows;
        if (first >= count) {
          outputs[block] = Lanes{};
          continue;
        }
        const T* rows[kRows];
        for (size_t r = 0; r < kRows; ++r) rows[r] = w + std::min(first + r, count - 1) * in;
        const T* ahead = first + kRows < kLanes ? w + (first + kRows) * in : next;
        outputs[block] = Dot::template multiply<kCount, kFetch>(rows, in, panel, ahead);
      }
      transpose_quarters(outputs);
    }
  };

 private:
  const Weight& weight_;
  const size_t in_;
};

// Reads memory before it is needed, into the second cache: four rows whose distance is a power of
// two would drive each other out of the first. Lines one after the other, whatever the rows'
// distance: this is how memory is fastest.
template <class T>
inline void fetch(const T* ahead, size_t step) {
  const auto* line = reinterpret_cast<const char*>(ahead) + step * kRows * 64;
  for (size_t r = 0; r < kRows; ++r) __builtin_prefetch(line + r * 64, 0, 2);
}

// Sums in float32 with registers of kBytes, of kSums outputs at once: as many as fit. All
// of these add in the same order: lane i of an output takes elements i, i + 16... of float32, and
// 2 i + 1, 2 i, 2 i + 33, 2 i + 32... of bfloat16.
template <class T, size_t kBytes, size_t kSums>
struct FloatDot {
  using Element = T;
  typedef float Floats __attribute__((vector_size(kBytes)));  // `using` drops a dependent size
  typedef uint32_t Words __attribute__((vector_size(kBytes)));
  static constexpr size_t kParts = sizeof(Lanes) / kBytes;
  static constexpr size_t kHalves = sizeof(float) / sizeof(T);  // of a step of x: odd, then even
  static constexpr size_t kStepBytes = kHalves * sizeof(Lanes);

  static void widen(const T* step, std::byte* panel) {
    for (size_t i = 0; i < kHalves * kParts; ++i) {
      const Floats x = half_of(step, i / kParts, i % kParts);
      std::memcpy(panel + i * kBytes, &x, kBytes);
    }
  }

  template <size_t kCount, bool kFetch>
  static Lanes multiply(const T* const (&rows)[kRows], size_t in, const std::byte* panel,
                        const T* ahead) {
    const Tails<T> tails(rows, in);
    Floats outputs[kLanes][kParts] = {};
    // tokens first: what is widened of a row then serves all of them
    constexpr size_t kTokensNow = std::min(kSums, kCount);
    constexpr size_t kRowsNow = std::bit_floor(std::min(kRows, kSums / kTokensNow));
    for (size_t t = 0; t < kCount; t += kTokensNow) {
      for (size_t r = 0; r < kRows; r += kRowsNow) {
        add<kTokensNow, kRowsNow, kFetch>(rows, tails.rows, in, panel, ahead, t, r, outputs);
      }
    }
    static_assert(kBytes == kRegisterBytes);
    return sums(outputs);
  }

 private:
  // A part of a step of a row, as floats; of bfloat16 the odd elements or the even ones.
  static Floats half_of(const T* step, size_t half, size_t part) {
    if constexpr (kHalves == 1) {
      Floats x;
      std::memcpy(&x, reinterpret_cast<const std::byte*>(step) + part * kBytes, kBytes);
      return x;
    } else {
      Words pairs;
      std::memcpy(&pairs, reinterpret_cast<const std::byte*>(step) + part * kBytes, kBytes);
      return reinterpret_cast<Floats>(half == 0 ? pairs & 0xffff0000u : pairs << 16);
    }
  }

  // Outputs of the block of tokens and rows that begins at token t, row r.
  template <size_t kTokensNow, size_t kRowsNow, bool kFetch>
  static void add(const T* const (&rows)[kRows], const T* const (&tails)[kRows], size_t in,
                  const std::byte* panel, const T* ahead, size_t t, size_t r,
                  Floats (&outputs)[kLanes][kParts]) {
    Floats totals[kTokensNow][kRowsNow][kParts] = {};
    const size_t whole = in / kStep<T>, steps = divided_up(in, kStep<T>);
    for (size_t s = 0; s < whole; ++s) {
      if (kFetch && t + r == 0) fetch(ahead, s);
      add_step(rows + r, s * kStep<T>, panel + (s * 4 + t) * kStepBytes, totals);
    }
    if (steps > whole) add_step(tails + r, 0, panel + (whole * 4 + t) * kStepBytes, totals);
    for (size_t i = 0; i < kTokensNow; ++i) {
      for (size_t j = 0; j < kRowsNow; ++j) {
        for (size_t p = 0; p < kParts; ++p) outputs[(t + i) * kRows + r + j][p] = totals[i][j][p];
      }
    }
  }

  template <size_t kTokensNow, size_t kRowsNow>
  static void add_step(const T* const* rows, size_t at, const std::byte* panel,
                       Floats (&totals)[kTokensNow][kRowsNow][kParts]) {
#pragma GCC unroll 2
    for (size_t half = 0; half < kHalves; ++half) {
#pragma GCC unroll 4
      for (size_t p = 0; p < kParts; ++p) {
        Floats w[kRowsNow];
#pragma GCC unroll 4
        for (size_t j = 0; j < kRowsNow; ++j) w[j] = half_of(rows[j] + at, half, p);
#pragma GCC unroll 4
        for (size_t i = 0; i < kTokensNow; ++i) {
          Floats x;
          std::memcpy(&x, panel + i * kStepBytes + (half * kParts + p) * kBytes, kBytes);
#pragma GCC unroll 4
          for (size_t j = 0; j < kRowsNow; ++j) totals[i][j][p] += w[j] * x;
        }
      }
    }
  }
};

// The kernels of both types with such registers.
template <size_t kBytes, size_t kSums>
struct FloatKernels {
  template <class T>
  using Product = RowsProduct<FloatDot<T, kBytes, kSums>>;

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
