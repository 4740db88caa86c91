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

inline Register spread(const float* word) {  // not a sum with zeros: a word need not be a float
  const float x = *word;
#if defined(__AVX512F__)
  return Register{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX2__)
  return Register{x, x, x, x, x, x, x, x};
#else
  return Register{x, x, x, x};
#endif
}

// Add: Element; kPack; add(sum, a, b) of registers; values(rows, at, to): words of the
// elements from `at` on of kPack values; some(rows, at, left, to): the same where only `left`
// elements are left, zeros behind.
template <class Add>
struct Products {
  struct Held {};
  using T = typename Add::Element;
#ifdef __AVX512F__
  static constexpr size_t kRows = 8;  // times two vectors or, of four rows, four
  static constexpr size_t vectors(size_t rows) { return rows > 4 ? 2 : 4; }
#else
  static constexpr size_t kRows = 4;  // times as many parts as sixteen registers hold
  static constexpr size_t vectors(size_t rows) { return rows > 2 ? 1 : 2; }
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
    Register sums[rows][count * kRegisters] = {};
    for (size_t step = 0; step < call.steps; ++step) {
      Register key[count * kRegisters];
#pragma GCC unroll 8
      for (size_t v = 0; v < count; ++v) {
#pragma GCC unroll 4
        for (size_t p = 0; p < kRegisters; ++p) {
          key[v * kRegisters + p] =
              load_register(keys + (v * call.steps + step) * kLanes + p * kRegisterLanes);
        }
        if (fetching && v % 2 == 0) {  // the keys' lines are as many as all steps
          call.ahead.fetch((vector * call.steps + step * count + v) / 2 + 2 * call.steps);
        }
      }
#pragma GCC unroll 8
      for (size_t r = 0; r < rows; ++r) {
        const Register query = spread(queries + r * call.steps + step);
#pragma GCC unroll 8
        for (size_t v = 0; v < count * kRegisters; ++v) {
          sums[r][v] = Add::add(sums[r][v], query, key[v]);
        }
      }
    }
    float* to = call.scores + row * kPiece + vector * kLanes;
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (size_t v = 0; v < count * kRegisters; ++v) {
        store_register(to + r * kPiece + v * kRegisterLanes, sums[r][v]);
      }
    }
  }

  template <size_t rows, size_t count, bool whole, bool fetching>
  static void mix_some(const Mix<T>& call, size_t row, size_t at) {
    float* to = call.sums + row * call.width + at;
    const float* weights = call.weights + row * kPiece;
    Register sums[rows][count * kRegisters];
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (size_t v = 0; v < count * kRegisters; ++v) {
        sums[r][v] = load_register(to + r * call.width + v * kRegisterLanes);
      }
    }
    for (size_t j = 0; j < call.count; j += Add::kPack) {
      Register value[count * kRegisters];
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
        const Register weight = spread(weights + r * kPiece + j / Add::kPack);
#pragma GCC unroll 8
        for (size_t v = 0; v < count * kRegisters; ++v) {
          sums[r][v] = Add::add(sums[r][v], weight, value[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (size_t v = 0; v < count * kRegisters; ++v) {
        store_register(to + r * call.width + v * kRegisterLanes, sums[r][v]);
      }
    }
  }
};

// Words that are floats.
template <class T>
struct Floats {
  using Element = T;
  static constexpr size_t kPack = 1;

  static Register add(Register sum, Register a, Register b) { return sum + a * b; }

  template <size_t count>
  static void values(const T* const* rows, size_t at, Register (&to)[count]) {
#pragma GCC unroll 16
    for (size_t v = 0; v < count; ++v) to[v] = load_register(rows[0] + at + v * kRegisterLanes);
  }
  template <size_t count>
  static void some(const T* const* rows, size_t at, size_t left, Register (&to)[count]) {
    for (size_t v = 0; v < count; ++v) {
      const size_t begin = std::min(left, v * kRegisterLanes);
      to[v] = load_some_register(rows[0] + at + begin, std::min(kRegisterLanes, left - begin));
    }
  }
};

template <class T>
struct LanesMath : Floats<T>, Products<Floats<T>> {
  using Element = T;

  static Lanes words(const T* from, size_t count) { return load_some(from, count); }

  static void turn(const T* const* keys, size_t at, size_t count, float* to) {
#pragma GCC unroll 4
    for (size_t key = 0; key < kLanes; key += kRegisterLanes) {
#pragma GCC unroll 4
      for (size_t word = 0; word < kLanes; word += kRegisterLanes) {
        const size_t some = count - std::min(count, word);
        Register block[kRegisterLanes];
#pragma GCC unroll 16
        for (size_t i = 0; i < kRegisterLanes; ++i) {
          const T* from = keys[key + i] + at + std::min(count, word);
          block[i] = some >= kRegisterLanes ? load_register(from) : load_some_register(from, some);
        }
        transpose_registers(block);
#pragma GCC unroll 16
        for (size_t i = 0; i < kRegisterLanes; ++i) {
          store_register(to + (word + i) * kLanes + key, block[i]);
        }
      }
    }
  }

  static void pack(Lanes weights, float* to) { store(to, weights); }
};

inline void lanes_attend(const Attend& call, Workspace& workspace) {
  call.type == Type::kFloat32 ? attend<LanesMath<float>>(call, workspace)
                              : attend<LanesMath<uint16_t>>(call, workspace);
}

}  // namespace
}  // namespace kvc2::attention
