#include "index/block_key.h"

#include <algorithm>

#include "base/check.h"
#include "base/sha256.h"
#include "base/xxh3.h"

namespace kvc2 {

BlockKey root_key(const Digest& space) { return xxh3_128(space.data(), space.size()); }

BlockKey next_key(BlockKey parent, Tokens block) {
  KVC2_CHECK(block.size() <= kMaxPageSize, "%zu tokens in a block", block.size());
  const size_t bytes = sizeof parent + block.size_bytes();
  struct {
    BlockKey parent;
    uint32_t tokens[kMaxPageSize];
  } joined;
  joined.parent = parent;
  // In steps of a fixed size: for one that varies GCC writes `rep movs`, which takes as long to
  // start as the hash of a small block takes.
  constexpr size_t kStep = 16;
  uint32_t* to = joined.tokens;
  for (; block.size() >= kStep; block = block.subspan(kStep), to += kStep) {
    std::memcpy(to, block.data(), kStep * sizeof(uint32_t));
  }
  std::ranges::copy(block, to);
  return xxh3_128(&joined, bytes);
}

std::vector<BlockKey> chain_keys(const BlockKey& parent, Tokens tokens, uint32_t page_size) {
  std::vector<BlockKey> keys(tokens.size() / page_size);
  BlockKey last = parent;
  for (size_t i = 0; i < keys.size(); ++i) {
    last = next_key(last, tokens.subspan(i * page_size, page_size));
    keys[i] = last;
  }
  return keys;
}

KeyBlock key_block(std::span<const uint8_t> key) {
  KVC2_CHECK(!key.empty() && key.size() <= kOpaqueKeyMax, "a key of %zu bytes", key.size());
  KeyBlock block{static_cast<uint32_t>(key.size())};
  std::memcpy(&block[1], key.data(), key.size());
  return block;
}

Digest next_digest(const Digest& parent, Tokens block) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(block.data());
  return sha256(parent, std::span(bytes, block.size_bytes()));
}

}  // namespace kvc2
