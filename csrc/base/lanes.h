// Sixteen floats side by side, as GCC's vector extension writes them: one source for every
// instruction set, since the compiler splits sums and products into what the file is compiled for.
// What it has no instruction for at that width (a shuffle, a choice) it would do lane by lane: so
// that, and loops that keep sums in registers, are written in parts, as wide as a register.
// Everything is in an anonymous namespace, so that each file keeps the code made for its own set.
// Not for files that need a particular instruction: those use intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Lanes are passed by value between functions that are inlined; no ABI is crossed.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace kvc2 {
namespace {

constexpr size_t kLanes = 16;

using Lanes = float __attribute__((vector_size(64)));
using IntLanes = int32_t __attribute__((vector_size(64)));
using WordLanes = uint32_t __attribute__((vector_size(64)));
using HalfLanes = uint16_t __attribute__((vector_size(32)));

#if defined(__AVX512F__)
constexpr size_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kRegisterBytes = 32;
#else
constexpr size_t kRegisterBytes = 16;
#endif
constexpr size_t kRegisters = 64 / kRegisterBytes, kRegisterLanes = kRegisterBytes / sizeof(float);
using Register = float __attribute__((vector_size(kRegisterBytes)));
using WordRegister = uint32_t __attribute__((vector_size(kRegisterBytes)));
using IntRegister = int32_t __attribute__((vector_size(kRegisterBytes)));
using HalfRegister = uint16_t __attribute__((vector_size(kRegisterBytes / 2)));

// f of each part of the arguments.
template <class F, class... More>
inline Lanes by_registers(const F& f, Lanes x, More... more) {
  if constexpr (kRegisters == 1) {
    return f(x, more...);
  } else {
    const auto at = [](const Lanes& from, size_t i) {
      Register part;
      std::memcpy(&part, reinterpret_cast<const char*>(&from) + i * kRegisterBytes, kRegisterBytes);
      return part;
    };
    Lanes made;
#pragma GCC unroll 4
    for (size_t i = 0; i < kRegisters; ++i) {
      const Register part = f(at(x, i), at(more, i)...);
      std::memcpy(reinterpret_cast<char*>(&made) + i * kRegisterBytes, &part, kRegisterBytes);
    }
    return made;
  }
}

inline Register load_register(const float* from) {
  Register x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline Register load_register(const uint16_t* from) {
  HalfRegister x;
  std::memcpy(&x, from, sizeof x);
  return reinterpret_cast<Register>(__builtin_convertvector(x, WordRegister) << 16);
}

inline void store_register(float* to, Register x) { std::memcpy(to, &x, sizeof x); }

inline Lanes broadcast(float x) { return Lanes{} + x; }

inline Lanes load(const void* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(void* to, Lanes x) { std::memcpy(to, &x, sizeof x); }

inline Lanes widen(HalfLanes x) {
  return reinterpret_cast<Lanes>(__builtin_convertvector(x, WordLanes) << 16);
}

// To the nearest bfloat16, ties to even, kept in the upper halves of the words; NaN stays NaN.
inline WordLanes round_to_bf16(Lanes x) {
  return reinterpret_cast<WordLanes>(by_registers(
      [](auto part) {
        const auto bits = reinterpret_cast<WordRegister>(part);
        const WordRegister rounded = bits + 0x7fff + ((bits >> 16) & 1);
        const auto ordered = part == part;
        return reinterpret_cast<Register>((ordered ? rounded : (bits | 0x400000)) & 0xffff0000u);
      },
      x));
}

// Sixteen elements of a type: float, or bfloat16 as its 16 bits.
inline Lanes load_as_floats(const float* from) { return load(from); }
inline Lanes load_as_floats(const uint16_t* from) {
  HalfLanes x;
  std::memcpy(&x, from, sizeof x);
  return widen(x);
}

inline void store_from_floats(float* to, Lanes x) { store(to, x); }
inline void store_from_floats(uint16_t* to, Lanes x) {
  const HalfLanes halves = __builtin_convertvector(round_to_bf16(x) >> 16, HalfLanes);
  std::memcpy(to, &halves, sizeof halves);
}

// The first `count` of sixteen; the rest is zero, and is not read.
template <class T>
inline Lanes load_some(const T* from, size_t count) {
  if (count == kLanes) return load_as_floats(from);
  T some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(T));
  return load_as_floats(some);
}

template <class T>
inline Register load_some_register(const T* from, size_t count) {
  T some[kRegisterLanes] = {};
  std::memcpy(some, from, count * sizeof(T));
  return load_register(some);
}

template <class T>
inline void store_some(T* to, Lanes x, size_t count) {
  if (count == kLanes) return store_from_floats(to, x);
  T some[kLanes];
  store_from_floats(some, x);
  std::memcpy(to, some, count * sizeof(T));
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline Lanes maximum(Lanes a, Lanes b) {
  return by_registers([](auto x, auto y) { return x > y ? x : y; }, a, b);
}

inline float sum(Lanes x) {
  float parts[kLanes];
  store(parts, x);
  for (size_t width = kLanes / 2; width > 0; width /= 2) {
    for (size_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

// e^x for x up to 88; exactly 0 under -87, so that a masked score adds nothing. Relative error
// under 2e-7: x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor series of e^r to the 7th power.
inline Register exponential_of(Register part) {
  const auto tiny = part < -87.0f;
  const Register least = Register{} - 87.0f;
  const Register bounded = part > least ? part : least;
  const Register magic = Register{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Register shifted = bounded * 1.44269504f + magic;
  const Register n = shifted - magic;
  const Register r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  Register series = Register{} + 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const auto exponent = (reinterpret_cast<WordRegister>(shifted) + 127) << 23;
  return tiny ? Register{} : series * reinterpret_cast<Register>(exponent);
}
inline Lanes exponential(Lanes x) {
  return by_registers([](Register part) { return exponential_of(part); }, x);
}

template <int kStep>
struct Step {
  static constexpr int value = kStep;
};

// Of two rows: what stands kStep lanes apart changes places.
template <int kStep>
inline void exchange_in_registers(Register& a, Register& b) {
  decltype(a < b) first, second;
  for (int lane = 0; lane < static_cast<int>(kRegisterLanes); ++lane) {
    const bool low = (lane & kStep) == 0;
    first[lane] = low ? lane : static_cast<int>(kRegisterLanes) + lane - kStep;
    second[lane] = low ? lane + kStep : static_cast<int>(kRegisterLanes) + lane;
  }
  const Register x = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = x;
}

template <int kStep>
inline void exchange(Register (&a)[kRegisters], Register (&b)[kRegisters]) {
  if constexpr (kStep < static_cast<int>(kRegisterLanes)) {
#pragma GCC unroll 4
    for (size_t i = 0; i < kRegisters; ++i) exchange_in_registers<kStep>(a[i], b[i]);
  } else {
    constexpr size_t kApart = kStep / kRegisterLanes;
#pragma GCC unroll 4
    for (size_t i = 0; i < kRegisters; ++i) {
      if ((i & kApart) != 0) continue;
      const Register moved = b[i];
      b[i] = a[i + kApart];
      a[i + kApart] = moved;
    }
  }
}

template <int kStep>
inline void exchange(Lanes& a, Lanes& b) {
  Register x[kRegisters], y[kRegisters];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  exchange<kStep>(x, y);
  std::memcpy(&a, x, sizeof a);
  std::memcpy(&b, y, sizeof b);
}

template <int kStep>
inline void exchange_rows(Lanes (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep]);
  }
}

// rows[i][j] becomes rows[j][i]. Moves bits, so the words may be anything.
inline void transpose(Lanes (&rows)[kLanes]) {
  exchange_rows<1>(rows);
  exchange_rows<2>(rows);
  exchange_rows<4>(rows);
  exchange_rows<8>(rows);
}

// rows[i][j] becomes rows[j][i], of as many rows as a register has lanes.
inline void transpose_registers(Register (&rows)[kRegisterLanes]) {
  const auto all = [&](auto step) {
    constexpr int kStep = decltype(step)::value;
    if constexpr (kStep < static_cast<int>(kRegisterLanes)) {
#pragma GCC unroll 16
      for (int i = 0; i < static_cast<int>(kRegisterLanes); ++i) {
        if ((i & kStep) == 0) exchange_in_registers<kStep>(rows[i], rows[i + kStep]);
      }
    }
  };
  all(Step<1>{}), all(Step<2>{}), all(Step<4>{}), all(Step<8>{});
}

// Halves the number of rows: lanes of `rows[i]` and of `rows[i + kStep]` are added in pairs.
template <int kStep>
inline void fold_rows(Register (&rows)[kLanes][kRegisters]) {
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i) {
    exchange<kStep>(rows[i], rows[i + kStep]);
#pragma GCC unroll 4
    for (size_t p = 0; p < kRegisters; ++p) rows[i][p] += rows[i + kStep][p];
  }
}

// Lane i is sum(rows[i]), added in the same order. Changes the rows.
inline Lanes sums(Register (&rows)[kLanes][kRegisters]) {
  fold_rows<8>(rows);
  fold_rows<4>(rows);
  fold_rows<2>(rows);
  fold_rows<1>(rows);
  Lanes all;
  std::memcpy(&all, rows[0], sizeof all);
  return all;
}
inline Lanes sums(Lanes (&rows)[kLanes]) {
  Register parts[kLanes][kRegisters];
  std::memcpy(parts, rows, sizeof rows);
  return sums(parts);
}

// Quarter j of quads[i] becomes quarter i of quads[j].
inline void transpose_quarters(Lanes (&quads)[4]) {
  exchange<4>(quads[0], quads[1]);
  exchange<4>(quads[2], quads[3]);
  exchange<8>(quads[0], quads[2]);
  exchange<8>(quads[1], quads[3]);
}

}  // namespace
}  // namespace kvc2
