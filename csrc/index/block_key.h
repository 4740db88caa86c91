// The two names of a block: its key (128 bits) in memory, its digest (256 bits) on disk and remote.
// Each name is a hash of the block's tokens and of the name before it, so that equal names mean
// equal prefixes. Keys alone are not trusted: the tree compares tokens too.
//
// A block that its engine names by an opaque key is the first and only one of a path. In the place
// of tokens it has words (KeyBlock): its key's length in bytes, and the key padded with zeros. So
// it is named, compared and found as any first block is.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace kvc2 {

using BlockKey = std::array<uint8_t, 16>;
using Digest = std::array<uint8_t, 32>;
using ExternalKey = std::array<uint8_t, 64>;
using Tokens = std::span<const uint32_t>;

constexpr size_t kOpaqueKeyMax = 64;  // bytes of an opaque key
constexpr uint32_t kKeyWords = 1 + kOpaqueKeyMax / sizeof(uint32_t);
using KeyBlock = std::array<uint32_t, kKeyWords>;

constexpr uint32_t kMaxPageSize = 512;  // tokens of a block; the header's field has this bound

struct NameHash {  // a name is a hash already: its first eight bytes do
  template <size_t N>
  size_t operator()(const std::array<uint8_t, N>& name) const {
    uint64_t word;
    std::memcpy(&word, name.data(), sizeof word);
    return word;
  }
};

// key[-1] = xxh3_128(namespace).
BlockKey root_key(const Digest& space);

// key[i] = xxh3_128(key[i-1] || tokens[i]); at most kMaxPageSize tokens. The parent goes by value,
// in registers: read back from where it was just written in halves, it would stall the chain.
BlockKey next_key(BlockKey parent, Tokens block);

// The keys of all full blocks of `tokens` after the block named `parent`.
std::vector<BlockKey> chain_keys(const BlockKey& parent, Tokens tokens, uint32_t page_size);

// What stands for a key of 1 to kOpaqueKeyMax bytes in the place of tokens.
KeyBlock key_block(std::span<const uint8_t> key);

// digest[i] = SHA-256(digest[i-1] || tokens[i]); digest[-1] = namespace.
Digest next_digest(const Digest& parent, Tokens block);

}  // namespace kvc2
