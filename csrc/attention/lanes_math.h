// The products in lanes: a word of a row is broadcast to sixteen keys, or to sixteen elements of a
// value. Each sum is one chain of `add(sum, a, b)` in a register, so what is summed side by side,
// as many rows and lanes as the registers hold, has no say in the bits.
//
// LanesMath multiplies in float32: the reference for every instruction set, and the kernel of those
// without products of bfloat16.
#pragma once

#include "attention/flash.h"

namespace kvc2::attention {
namespace {

inline Lanes spread(const float* word) {  // not broadcast(): a word need not be a float
  const float x = *word;
  return Lanes{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

// Add: Element; kPack; add(sum, a, b); values(rows, at, to): vectors of words, of the elements from
// `at` on of kPack values; some(rows, at, left, to): the same where only `left` elements are left,
// zeros behind.
template <class Add>
struct Products {
  using T = typename Add::Element;
#ifdef __AVX512F__
  static constexpr size_t kRows = 8;  // times two vectors or, of four rows, four
  static constexpr size_t vectors(size_t rows) { return rows > 4 ? 2 : 4; }
#else
  static constexpr size_t kRows = 4;
  static constexpr size_t vectors(size_t) { return 1; }
#endif

  static void score(const Score<T>& call) {
    for (size_t row = 0; row < call.rows; row += kRows) {
      by_rows<kRows>(call.rows - row, [&](auto rows) {
        constexpr size_t kCount = vectors(rows);
        for (size_t at = 0; at < call.vectors; at += kCount) {
          row == 0 ? score_some<rows, kCount, true>(call, row, at)
                   : score_some<rows, kCount, false>(call, row, at);
        }
      });
    }
  }

  static void mix(const Mix<T>& call) {
    for (size_t row = 0; row < call.rows; row += kRows) {
      by_rows<kRows>(call.rows - row, [&](auto rows) {
        constexpr size_t kCount = vectors(rows);
        size_t at = 0;
        for (; at + kCount * kLanes <= call.size; at += kCount * kLanes) {
          row == 0 ? mix_some<rows, kCount, true, true>(call, row, at)
                   : mix_some<rows, kCount, true, false>(call, row, at);
        }
        for (; at < call.size; at += kWidth) mix_some<rows, 2, false, false>(call, row, at);
      });
    }
  }

 private:
  template <size_t n>
  struct Number {
    constexpr operator size_t() const { return n; }
  };

  // use(the lesser of `most` and n), as a constant.
  template <size_t most, class Use>
  static void by_rows(size_t n, const Use& use) {
    if constexpr (most > 1) {
      if (n < most) return by_rows<most - 1>(n, use);
    }
    use(Number<most>{});
  }

  template <size_t rows, size_t count, bool fetching>
  static void score_some(const Score<T>& call, size_t row, size_t vector) {
    const float* queries = call.queries + row * call.steps;
    const float* keys = call.keys + vector * call.steps * kLanes;
    Lanes sums[rows][count] = {};
    for (size_t step = 0; step < call.steps; ++step) {
      Lanes key[count];
#pragma GCC unroll 8
      for (size_t v = 0; v < count; ++v) {
        key[v] = load(keys + (v * call.steps + step) * kLanes);
        if (fetching && v % 2 == 0) {  // the keys' lines are as many as all steps
          call.ahead.fetch((vector * call.steps + step * count + v) / 2 + 2 * call.steps);
        }
      }
#pragma GCC unroll 8
      for (size_t r = 0; r < rows; ++r) {
        const Lanes query = spread(queries + r * call.steps + step);
#pragma GCC unroll 8
        for (size_t v = 0; v < count; ++v) sums[r][v] = Add::add(sums[r][v], query, key[v]);
      }
    }
    float* to = call.scores + row * kPiece + vector * kLanes;
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (size_t v = 0; v < count; ++v) store(to + r * kPiece + v * kLanes, sums[r][v]);
    }
  }

  template <size_t rows, size_t count, bool whole, bool fetching>
  static void mix_some(const Mix<T>& call, size_t row, size_t at) {
    float* to = call.sums + row * call.width + at;
    const float* weights = call.weights + row * kPiece;
    Lanes sums[rows][count];
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (size_t v = 0; v < count; ++v) sums[r][v] = load(to + r * call.width + v * kLanes);
    }
    for (size_t j = 0; j < call.count; j += Add::kPack) {
      Lanes value[count];
      if constexpr (whole) {
        Add::values(call.values + j, at, value);
      } else {
        Add::some(call.values + j, at, call.size - at, value);
      }
      if (fetching) {
#pragma GCC unroll 8
        for (size_t v = 0; v < count; ++v) {
          call.ahead.fetch((j / Add::kPack * count + v) + at * (kBlock / kLanes / Add::kPack));
        }
      }
#pragma GCC unroll 8
      for (size_t r = 0; r < rows; ++r) {
        const Lanes weight = spread(weights + r * kPiece + j / Add::kPack);
#pragma GCC unroll 8
        for (size_t v = 0; v < count; ++v) sums[r][v] = Add::add(sums[r][v], weight, value[v]);
      }
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (size_t v = 0; v < count; ++v) store(to + r * call.width + v * kLanes, sums[r][v]);
    }
  }
};

// Words that are floats.
template <class T>
struct Floats {
  using Element = T;
  static constexpr size_t kPack = 1;

  static Lanes add(Lanes sum, Lanes a, Lanes b) { return sum + a * b; }

  template <size_t count>
  static void values(const T* const* rows, size_t at, Lanes (&to)[count]) {
#pragma GCC unroll 8
    for (size_t v = 0; v < count; ++v) to[v] = load_as_floats(rows[0] + at + v * kLanes);
  }
  template <size_t count>
  static void some(const T* const* rows, size_t at, size_t left, Lanes (&to)[count]) {
    for (size_t v = 0; v < count; ++v) {
      const size_t begin = std::min(left, v * kLanes);
      to[v] = load_some(rows[0] + at + begin, std::min(kLanes, left - begin));
    }
  }
};

template <class T>
struct LanesMath : Floats<T>, Products<Floats<T>> {
  using Element = T;

  static Lanes words(const T* from, size_t count) { return load_some(from, count); }

  static void turn(const T* const* keys, size_t at, size_t count, float* to) {
#ifdef __AVX512F__
    Lanes words[kLanes];
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) {
      words[i] = count == kLanes ? load_as_floats(keys[i] + at) : load_some(keys[i] + at, count);
    }
    transpose(words);
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) store(to + i * kLanes, words[i]);
#else  // shuffles of sixteen lanes are far slower there
    for (size_t i = 0; i < kLanes; ++i) {
      for (size_t word = 0; word < kLanes; ++word) {
        to[word * kLanes + i] = word < count ? to_float(keys[i][at + word]) : 0.0f;
      }
    }
#endif
  }

  static void pack(Lanes weights, float* to) { store(to, weights); }
};

inline void lanes_attend(const Attend& call, Workspace& workspace) {
  call.type == Type::kFloat32 ? attend<LanesMath<float>>(call, workspace)
                              : attend<LanesMath<uint16_t>>(call, workspace);
}

}  // namespace
}  // namespace kvc2::attention
