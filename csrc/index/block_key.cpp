#include "index/block_key.h"

#include "base/check.h"
#include "base/sha256.h"
#include "base/xxh3.h"

namespace kvc2 {

BlockKey root_key(const Digest& space) { return xxh3_128(space.data(), space.size()); }

BlockKey next_key(const BlockKey& parent, Tokens block) {
  KVC2_CHECK(block.size() <= kMaxPageSize, "%zu tokens in a block", block.size());
  uint8_t joined[sizeof(BlockKey) + kMaxPageSize * sizeof(uint32_t)];
  std::memcpy(joined, parent.data(), parent.size());
  std::memcpy(joined + parent.size(), block.data(), block.size_bytes());
  return xxh3_128(joined, parent.size() + block.size_bytes());
}

std::vector<BlockKey> chain_keys(const BlockKey& parent, Tokens tokens, uint32_t page_size) {
  std::vector<BlockKey> keys(tokens.size() / page_size);
  const BlockKey* last = &parent;
  for (size_t i = 0; i < keys.size(); ++i) {
    keys[i] = next_key(*last, tokens.subspan(i * page_size, page_size));
    last = &keys[i];
  }
  return keys;
}

Digest next_digest(const Digest& parent, Tokens block) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(block.data());
  return sha256(parent, std::span(bytes, block.size_bytes()));
}

}  // namespace kvc2
