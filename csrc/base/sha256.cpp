#include "base/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/cpu.h"
#include "base/sha256_compress.h"

namespace kvc2 {
namespace sha {

const uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

namespace {

uint32_t read_big_endian(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return __builtin_bswap32(word);
}

// FIPS 180-4, 6.2.2 step 1
void schedule(uint32_t w[64], const uint8_t* data) {
  for (int t = 0; t < 16; ++t) w[t] = read_big_endian(data + t * 4);
  for (int t = 16; t < 64; ++t) {
    const uint32_t x = w[t - 15], y = w[t - 2];
    const uint32_t sigma0 = std::rotr(x, 7) ^ std::rotr(x, 18) ^ (x >> 3);
    const uint32_t sigma1 = std::rotr(y, 17) ^ std::rotr(y, 19) ^ (y >> 10);
    w[t] = w[t - 16] + sigma0 + w[t - 7] + sigma1;
  }
}

// FIPS 180-4, 6.2.2 steps 2 to 4
void rounds(uint32_t state[8], const uint32_t w[64]) {
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  for (int t = 0; t < 64; ++t) {
    const uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
    const uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
    const uint32_t one = h + sum1 + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
    const uint32_t two = sum0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + one;
    d = c, c = b, b = a, a = one + two;
  }
  const uint32_t after[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += after[i];
}

}  // namespace

void compress_portable(uint32_t state[8], const uint8_t* data, size_t blocks) {
  for (; blocks > 0; --blocks, data += kBlockBytes) {
    uint32_t w[64];
    schedule(w, data);
    rounds(state, w);
  }
}

}  // namespace sha

namespace {

class Sha256 {
 public:
  void update(std::span<const uint8_t> data) {
    bytes_ += data.size();
    if (held_ > 0) {
      const size_t taken = std::min(data.size(), sha::kBlockBytes - held_);
      hold(data.first(taken));
      data = data.subspan(taken);
      if (held_ < sha::kBlockBytes) return;
      compress_(state_, block_, 1);
      held_ = 0;
    }
    const size_t blocks = data.size() / sha::kBlockBytes;
    compress_(state_, data.data(), blocks);
    hold(data.subspan(blocks * sha::kBlockBytes));
  }

  // Padding of FIPS 180-4, 5.1.1: a one bit, zeros, the length in bits.
  std::array<uint8_t, 32> finish() {
    const uint64_t bits = __builtin_bswap64(uint64_t{bytes_} * 8);
    const size_t zeros = (held_ < 56 ? 55 : 119) - held_;
    std::array<uint8_t, 128> tail{0x80};
    std::memcpy(tail.data() + 1 + zeros, &bits, sizeof bits);
    update(std::span(tail).first(1 + zeros + sizeof bits));
    std::array<uint8_t, 32> digest;
    for (size_t i = 0; i < 8; ++i) {
      const uint32_t word = __builtin_bswap32(state_[i]);
      std::memcpy(digest.data() + i * 4, &word, sizeof word);
    }
    return digest;
  }

 private:
  void hold(std::span<const uint8_t> data) {
    if (data.empty()) return;  // memcpy from a null pointer is undefined even for no bytes
    std::memcpy(block_ + held_, data.data(), data.size());
    held_ += data.size();
  }

  static sha::Compress compress_here() {
    static const sha::Compress here = cpu().sha_ni ? sha::compress_shani : sha::compress_portable;
    return here;
  }

  const sha::Compress compress_ = compress_here();
  // FIPS 180-4, 5.3.3
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t block_[sha::kBlockBytes];
  size_t held_ = 0;
  size_t bytes_ = 0;
};

}  // namespace

std::array<uint8_t, 32> sha256(std::span<const uint8_t> data) { return sha256(data, {}); }

std::array<uint8_t, 32> sha256(std::span<const uint8_t> first, std::span<const uint8_t> second) {
  Sha256 hash;
  hash.update(first);
  hash.update(second);
  return hash.finish();
}

}  // namespace kvc2
