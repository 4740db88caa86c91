#include "base/xxh3.h"

#include <cstring>

#include "base/cpu.h"
#include "base/xxh3_long.h"

namespace kvc2 {
namespace xxh3 {

const uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

}  // namespace xxh3

namespace {

using xxh3::kSecret;

__extension__ using u128 = unsigned __int128;

// Names and values of the specification.
constexpr uint64_t kPrime32_1 = xxh3::kPrime32_1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kPrimeMx1 = 0x165667919E3779F9, kPrimeMx2 = 0x9FB21C651E98DF25;

struct Hash {
  uint64_t low, high;
};

uint64_t read64(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

uint32_t read32(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

uint64_t low_half(u128 x) { return static_cast<uint64_t>(x); }
uint64_t high_half(u128 x) { return static_cast<uint64_t>(x >> 64); }

uint64_t folded(uint64_t a, uint64_t b) {
  const u128 product = u128{a} * b;
  return low_half(product) ^ high_half(product);
}

uint64_t avalanche(uint64_t x) {
  x ^= x >> 37;
  x *= kPrimeMx1;
  return x ^ (x >> 32);
}

uint64_t avalanche_xxh64(uint64_t x) {
  x ^= x >> 33;
  x *= kPrime64_2;
  x ^= x >> 29;
  x *= kPrime64_3;
  return x ^ (x >> 32);
}

Hash hash_empty() {
  return {avalanche_xxh64(read64(kSecret + 64) ^ read64(kSecret + 72)),
          avalanche_xxh64(read64(kSecret + 80) ^ read64(kSecret + 88))};
}

Hash hash_1_to_3(const uint8_t* input, size_t bytes) {
  const uint32_t combined = uint32_t{input[bytes - 1]} | static_cast<uint32_t>(bytes << 8) |
                            uint32_t{input[0]} << 16 | uint32_t{input[bytes >> 1]} << 24;
  const uint32_t swapped = __builtin_bswap32(combined);
  const uint32_t turned = swapped << 13 | swapped >> 19;
  const uint64_t low = uint64_t{read32(kSecret) ^ read32(kSecret + 4)} ^ combined;
  const uint64_t high = uint64_t{read32(kSecret + 8) ^ read32(kSecret + 12)} ^ turned;
  return {avalanche_xxh64(low), avalanche_xxh64(high)};
}

Hash hash_4_to_8(const uint8_t* input, size_t bytes) {
  const uint64_t combined = read32(input) | uint64_t{read32(input + bytes - 4)} << 32;
  const uint64_t value = read64(kSecret + 16) ^ read64(kSecret + 24) ^ combined;
  const u128 product = u128{value} * (kPrime64_1 + (uint64_t{bytes} << 2));
  uint64_t low = low_half(product);
  const uint64_t high = high_half(product) + (low << 1);
  low ^= high >> 3;
  low ^= low >> 35;
  low *= kPrimeMx2;
  low ^= low >> 28;
  return {low, avalanche(high)};
}

Hash hash_9_to_16(const uint8_t* input, size_t bytes) {
  const uint64_t first = read64(input), last = read64(input + bytes - 8);
  const uint64_t one = read64(kSecret + 32) ^ read64(kSecret + 40) ^ first ^ last;
  const uint64_t two = read64(kSecret + 48) ^ read64(kSecret + 56) ^ last;
  const u128 product = u128{one} * kPrime64_1;
  uint64_t low = low_half(product) + (uint64_t{bytes - 1} << 54);
  const uint64_t high = high_half(product) + two + (two & 0xFFFFFFFF) * (kPrime32_2 - 1);
  low ^= __builtin_bswap64(high);
  const u128 second = u128{low} * kPrime64_2;
  return {avalanche(low_half(second)), avalanche(high_half(second) + high * kPrime64_2)};
}

// Accumulators of a medium input.
struct Pair {
  // mixTwoChunks of the specification; with seed 0 its negated seed is the same.
  void mix(const uint8_t* one, const uint8_t* two, size_t secret) {
    low += chunk(one, kSecret + secret);
    high += chunk(two, kSecret + secret + 16);
    low ^= read64(two) + read64(two + 8);
    high ^= read64(one) + read64(one + 8);
  }
  static uint64_t chunk(const uint8_t* data, const uint8_t* secret) {
    return folded(read64(data) ^ read64(secret), read64(data + 8) ^ read64(secret + 8));
  }
  uint64_t low, high;
};

Hash finish_medium(Pair acc, size_t bytes) {
  const uint64_t high = acc.low * kPrime64_1 + acc.high * kPrime64_4 + uint64_t{bytes} * kPrime64_2;
  return {avalanche(acc.low + acc.high), 0 - avalanche(high)};
}

Hash hash_17_to_128(const uint8_t* input, size_t bytes) {
  Pair acc{uint64_t{bytes} * kPrime64_1, 0};
  for (size_t i = (bytes - 1) / 32 + 1; i-- > 0;) {
    acc.mix(input + i * 16, input + bytes - i * 16 - 16, i * 32);
  }
  return finish_medium(acc, bytes);
}

Hash hash_129_to_240(const uint8_t* input, size_t bytes) {
  Pair acc{uint64_t{bytes} * kPrime64_1, 0};
  for (size_t i = 0; i < 4; ++i) acc.mix(input + i * 32, input + i * 32 + 16, i * 32);
  acc = {avalanche(acc.low), avalanche(acc.high)};
  for (size_t i = 4; i < bytes / 32; ++i) {
    acc.mix(input + i * 32, input + i * 32 + 16, (i - 4) * 32 + 3);
  }
  acc.mix(input + bytes - 16, input + bytes - 32, 103);
  return finish_medium(acc, bytes);
}

uint64_t merged(const uint64_t acc[8], uint64_t start, const uint8_t* secret) {
  for (size_t i = 0; i < 8; i += 2) {
    start += folded(acc[i] ^ read64(secret + i * 8), acc[i + 1] ^ read64(secret + i * 8 + 8));
  }
  return avalanche(start);
}

xxh3::Consume consume_here() {
  if (cpu().isa >= Isa::kAvx512) return xxh3::consume_avx512;
  if (cpu().isa >= Isa::kAvx2) return xxh3::consume_avx2;
  return xxh3::consume_portable;
}

Hash hash_long(const uint8_t* input, size_t bytes) {
  static const xxh3::Consume consume = consume_here();
  uint64_t acc[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                     kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  consume(acc, input, bytes);
  const uint64_t length = bytes;
  return {merged(acc, length * kPrime64_1, kSecret + 11),
          merged(acc, ~(length * kPrime64_2), kSecret + xxh3::kSecretBytes - 75)};
}

Hash hash(const uint8_t* input, size_t bytes) {
  if (bytes > 240) return hash_long(input, bytes);
  if (bytes > 128) return hash_129_to_240(input, bytes);
  if (bytes > 16) return hash_17_to_128(input, bytes);
  if (bytes > 8) return hash_9_to_16(input, bytes);
  if (bytes > 3) return hash_4_to_8(input, bytes);
  if (bytes > 0) return hash_1_to_3(input, bytes);
  return hash_empty();
}

struct Lanes {
  explicit Lanes(const uint64_t* start) { std::memcpy(acc, start, sizeof acc); }
  void accumulate(const uint8_t* input, const uint8_t* secret) {
    for (size_t i = 0; i < 8; ++i) {
      const uint64_t data = read64(input + i * 8);
      const uint64_t value = data ^ read64(secret + i * 8);
      acc[i ^ 1] += data;
      acc[i] += (value & 0xFFFFFFFF) * (value >> 32);
    }
  }
  void scramble(const uint8_t* secret) {
    for (size_t i = 0; i < 8; ++i) {
      acc[i] = (acc[i] ^ (acc[i] >> 47) ^ read64(secret + i * 8)) * kPrime32_1;
    }
  }
  void store(uint64_t* out) const { std::memcpy(out, acc, sizeof acc); }
  uint64_t acc[8];
};

}  // namespace

void xxh3::consume_portable(uint64_t acc[8], const uint8_t* input, size_t bytes) {
  consume<Lanes>(acc, input, bytes);
}

std::array<uint8_t, 16> xxh3_128(const void* data, size_t bytes) {
  const Hash result = hash(static_cast<const uint8_t*>(data), bytes);
  const uint64_t words[2] = {__builtin_bswap64(result.high), __builtin_bswap64(result.low)};
  std::array<uint8_t, 16> canonical;
  std::memcpy(canonical.data(), words, sizeof words);
  return canonical;
}

}  // namespace kvc2
