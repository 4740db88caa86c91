// The part of XXH3 that touches every byte of a long input, once per instruction set. A file
// xxh3_*.cpp gives the lanes, this template the order of stripes.
//
// These files are compiled for instruction sets that the machine may lack, so they use no inline
// function of the standard library: the linker could keep their copy of it for everyone. For the
// same reason `Lanes` is declared in an unnamed namespace there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvc2::xxh3 {

constexpr size_t kSecretBytes = 192, kStripeBytes = 64, kStripes = 16;
constexpr size_t kRoundBytes = kStripeBytes * kStripes;  // stripes per scramble

extern const uint8_t kSecret[kSecretBytes];
// The hardware's own prefetch stops at each 4 KiB; two rounds ahead gains 15 % on cold payloads.
constexpr size_t kRoundsAhead = 2;

constexpr uint64_t kPrime32_1 = 0x9E3779B1;

// Consumes an input of more than 240 bytes into `acc`: steps 2 and 3 of the specification.
using Consume = void (*)(uint64_t acc[8], const uint8_t* input, size_t bytes);
void consume_portable(uint64_t acc[8], const uint8_t* input, size_t bytes);
void consume_avx2(uint64_t acc[8], const uint8_t* input, size_t bytes);
void consume_avx512(uint64_t acc[8], const uint8_t* input, size_t bytes);

template <class Lanes>
void consume(uint64_t acc[8], const uint8_t* input, size_t bytes) {
  Lanes lanes(acc);
  const size_t rounds = (bytes - 1) / kRoundBytes;  // a last full round is left to the tail
  for (size_t round = 0; round < rounds; ++round, input += kRoundBytes) {
    const size_t ahead = round + kRoundsAhead < rounds ? kRoundsAhead * kRoundBytes : 0;
#pragma GCC unroll 16
    for (size_t n = 0; n < kStripes; ++n) {
      __builtin_prefetch(input + n * kStripeBytes + ahead);
      lanes.accumulate(input + n * kStripeBytes, kSecret + n * 8);
    }
    lanes.scramble(kSecret + kSecretBytes - kStripeBytes);
  }
  const size_t left = bytes - rounds * kRoundBytes;
  for (size_t n = 0; n < (left - 1) / kStripeBytes; ++n) {
    lanes.accumulate(input + n * kStripeBytes, kSecret + n * 8);
  }
  lanes.accumulate(input + left - kStripeBytes, kSecret + kSecretBytes - 71);
  lanes.store(acc);
}

}  // namespace kvc2::xxh3
