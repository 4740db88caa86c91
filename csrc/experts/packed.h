// Quantised weights: each a record of bytes that says of itself how it is stored, so that two
// tensors of one model may differ. engine/quantised.py writes them; nothing reads them but the
// kernels, and whoever copies them needs to know their length alone.
//
//   head        64 bytes
//   values      of each part, of each block of sixteen rows, step by step: a line of 64 bytes, four
//               of them for each row: values k to k + 3 of `in`, or eight nibbles, the low ones of
//               k to k + 3 and the high ones of k + 4 to k + 7
//   scales      of each part and block, of each group of `in`: sixteen; bfloat16 of nibbles, else
//               float32
//   zeros       of nibbles that have zero points: a byte where a scale stands
//
// Sections begin at multiples of 64 bytes. Rows and `in` are filled up with zero points (of eight
// bits: 128; of floats: zero), scales with zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvc2::experts {

// Inlined always: files for an instruction set include this, and leave no copy to the linker.
#define KVC2_INLINE [[gnu::always_inline]]

// The value of a stored number is scale * (number - zero point).
//   kInt8   a byte, its zero point 128
//   kInt4   a nibble, its zero point 8, or a byte of `zeros`
//   kFp8    float8 e4m3fn, without one; its codes for NaN (0x7f, 0xff) are not stored
enum class Format : uint8_t { kInt8 = 1, kInt4 = 2, kFp8 = 3 };

struct PackedHead {
  static constexpr uint32_t kMagic = 0x3157514b;  // "KQW1"

  uint32_t magic;
  Format format;
  uint8_t has_zeros;
  uint8_t reserved[2];
  uint32_t parts;  // matrices of the same size, one after the other: 2 for gate and up
  uint32_t rows;   // of a part
  uint32_t in;
  uint32_t group;  // of `in`, under one scale; a multiple of 8
  uint8_t unused[40];

  KVC2_INLINE size_t blocks() const { return (size_t{rows} + 15) / 16; }  // of a part
  KVC2_INLINE size_t groups() const { return (size_t{in} + group - 1) / group; }
  KVC2_INLINE size_t values_a_line() const { return format == Format::kInt4 ? 8 : 4; }
  KVC2_INLINE size_t lines() const {
    return (in + values_a_line() - 1) / values_a_line();
  }  // of a block
  KVC2_INLINE size_t scale_bytes() const { return format == Format::kInt4 ? 2 : 4; }

  KVC2_INLINE static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }
  KVC2_INLINE size_t values_at() const { return sizeof(PackedHead); }
  KVC2_INLINE size_t scales_at() const { return values_at() + parts * blocks() * lines() * 64; }
  KVC2_INLINE size_t zeros_at() const {
    return scales_at() + whole_lines(parts * blocks() * groups() * 16 * scale_bytes());
  }
  KVC2_INLINE size_t bytes() const {
    return zeros_at() + (has_zeros ? whole_lines(parts * blocks() * groups() * 16) : 0);
  }

  // Whether a record may begin so. Nothing of `bytes` overflows then.
  KVC2_INLINE bool valid() const {
    constexpr uint32_t kMost = 1 << 24;
    const bool known = format >= Format::kInt8 && format <= Format::kFp8;
    return magic == kMagic && known && parts >= 1 && parts <= 2 && rows >= 1 && rows <= kMost &&
           in >= 1 && in <= kPackedIn && group >= 8 && group % 8 == 0 && group <= kMost &&
           has_zeros <= (format == Format::kInt4);
  }
  // 127 * 255 * in fits into an int32, so that sums of bytes are exact.
  static constexpr uint32_t kPackedIn = 1 << 16;
};
static_assert(sizeof(PackedHead) == 64);

#undef KVC2_INLINE

}  // namespace kvc2::experts
