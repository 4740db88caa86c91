// Sixteen floats side by side, as GCC's vector extension writes them: one source for every
// instruction set, since the compiler splits them into what the file is compiled for. Everything
// is in an anonymous namespace, so that each file keeps the code made for its own set.
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
  const auto bits = reinterpret_cast<WordLanes>(x);
  const WordLanes rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const IntLanes ordered = x == x;
  return (ordered ? rounded : (bits | 0x400000)) & 0xffff0000u;
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
  T some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(T));
  return load_as_floats(some);
}

template <class T>
inline void store_some(T* to, Lanes x, size_t count) {
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

inline Lanes maximum(Lanes a, Lanes b) { return a > b ? a : b; }

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
inline Lanes exponential(Lanes x) {
  const IntLanes tiny = x < -87.0f;
  const Lanes bounded = maximum(x, broadcast(-87.0f));
  const Lanes magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Lanes shifted = bounded * 1.44269504f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  Lanes series = broadcast(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const auto exponent = (reinterpret_cast<WordLanes>(shifted) + 127) << 23;
  return tiny ? Lanes{} : series * reinterpret_cast<Lanes>(exponent);
}

template <int kStep>
inline void exchange(Lanes& a, Lanes& b) {
  IntLanes first, second;
  for (int lane = 0; lane < 16; ++lane) {
    const bool low = (lane & kStep) == 0;
    first[lane] = low ? lane : 16 + lane - kStep;
    second[lane] = low ? lane + kStep : 16 + lane;
  }
  const Lanes x = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = x;
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

// Halves the number of vectors: lanes of `rows[i]` and of `rows[i + kStep]` are added in pairs.
template <int kStep>
inline void fold_rows(Lanes (&rows)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i) {
    exchange<kStep>(rows[i], rows[i + kStep]);
    rows[i] += rows[i + kStep];
  }
}

// Lane i is sum(rows[i]), added in the same order. Changes the rows.
inline Lanes sums(Lanes (&rows)[kLanes]) {
  fold_rows<8>(rows);
  fold_rows<4>(rows);
  fold_rows<2>(rows);
  fold_rows<1>(rows);
  return rows[0];
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
