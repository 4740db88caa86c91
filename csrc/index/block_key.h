// The two names of a block: its key (128 bits) in memory, its digest (256 bits) on disk and remote.
// Each name is a hash of the block's tokens and of the name before it, so that equal names mean
// equal prefixes. Keys alone are not trusted: the tree compares tokens too.
//
// A block that its engine names by an opaque key is the first and only one of a path. In the place
// of tokens it has words (KeyBlock): its key's length in bytes, and the key padded with zeros. So
// it is named, compared and found as any first block is.
//
// A block in which an image begins has extras, a digest of what begins there. It is hashed after
// the tokens, and compared beside them. The names of all blocks after it follow from its own, so
// that they have none for the same image, and those before it are what they are without.
#pragma once

#include <algorithm>
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

struct BlockExtras {
  uint32_t block;  // its position in the prompt
  Digest digest;
};
using Extras = std::span<const BlockExtras>;  // rising by block

// What one block is made of.
struct Block {
  Tokens tokens;
  const Digest* extras;  // null: none

  Block(Tokens of, const Digest* beside = nullptr) : tokens(of), extras(beside) {}
  Block(const KeyBlock& key) : Block(Tokens(key)) {}
};

// What a prompt, or consecutive blocks of one, is made of: tokens, and the extras of some blocks.
struct Content {
  Tokens tokens;
  Extras extras;   // of the prompt
  uint64_t first;  // position in the prompt of the first block of `tokens`

  Content(Tokens of, Extras beside = {}, uint64_t at = 0) : tokens(of), extras(beside), first(at) {}
  Content(const KeyBlock& key) : Content(Tokens(key)) {}

  // `size` is that of a block; `index` counts from `first`.
  Block block(size_t index, size_t size) const {
    return {tokens.subspan(index * size, size), extras.empty() ? nullptr : extras_of(index)};
  }
  Content before(size_t end, size_t size) const {
    return {tokens.first(end * size), extras, first};
  }
  Content after(size_t blocks, size_t size) const {
    return {tokens.subspan(blocks * size), extras, first + blocks};
  }
  // Its tokens before the next block, from the index-th on, that has extras.
  Tokens until_extras(size_t index, size_t size) const {
    if (extras.empty()) return tokens;
    return tokens.first(std::min(tokens.size(), next_extras(index) * size));
  }

 private:
  const Digest* extras_of(size_t index) const;
  size_t next_extras(size_t index) const;  // very large: there are none
};

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

// key[i] = xxh3_128(key[i-1] || tokens[i] || extras[i]); at most kMaxPageSize tokens. The parent
// goes by value, in registers: read back from where it was just written in halves, it would stall
// the chain.
BlockKey next_key(BlockKey parent, Tokens block, const Digest* extras);
inline BlockKey next_key(BlockKey parent, const Block& block) {
  return next_key(parent, block.tokens, block.extras);
}

// The keys of all full blocks after the block named `parent`.
std::vector<BlockKey> chain_keys(const BlockKey& parent, const Content& content,
                                 uint32_t page_size);

// What stands for a key of 1 to kOpaqueKeyMax bytes in the place of tokens.
KeyBlock key_block(std::span<const uint8_t> key);

// digest[i] = SHA-256(digest[i-1] || tokens[i] || extras[i]); digest[-1] = namespace.
Digest next_digest(const Digest& parent, const Block& block);

}  // namespace kvc2
