#include "index/block_key.h"

#include <algorithm>

#include "base/check.h"
#include "base/sha256.h"
#include "base/xxh3.h"

namespace kvc2 {

constexpr size_t kNoExtras = size_t{1} << 32;  // beyond any prompt's blocks

BlockKey root_key(const Digest& space) { return xxh3_128(space.data(), space.size()); }

static Extras::iterator first_from(Extras extras, uint64_t block) {
  return std::ranges::lower_bound(extras, block, {}, &BlockExtras::block);
}

const Digest* Content::extras_of(size_t index) const {
  const auto found = first_from(extras, first + index);
  return found != extras.end() && found->block == first + index ? &found->digest : nullptr;
}

size_t Content::next_extras(size_t index) const {
  const auto found = first_from(extras, first + index);
  return found == extras.end() ? kNoExtras : found->block - first;
}

BlockKey next_key(BlockKey parent, Tokens block, const Digest* extras) {
  KVC2_CHECK(block.size() <= kMaxPageSize, "%zu tokens in a block", block.size());
  const size_t bytes = sizeof parent + block.size_bytes();
  struct {
    BlockKey parent;
    uint32_t tokens[kMaxPageSize + sizeof(Digest) / sizeof(uint32_t)];
  } joined;
  joined.parent = parent;
  // In steps of a fixed size: for one that varies GCC writes `rep movs`, which takes as long to
  // start as the hash of a small block takes.
  constexpr size_t kStep = 16;
  uint32_t* to = joined.tokens;
  for (; block.size() >= kStep; block = block.subspan(kStep), to += kStep) {
    std::memcpy(to, block.data(), kStep * sizeof(uint32_t));
  }
  to = std::ranges::copy(block, to).out;
  if (!extras) return xxh3_128(&joined, bytes);
  std::memcpy(to, extras, sizeof *extras);
  return xxh3_128(&joined, bytes + sizeof *extras);
}

std::vector<BlockKey> chain_keys(const BlockKey& parent, const Content& content,
                                 uint32_t page_size) {
  std::vector<BlockKey> keys(content.tokens.size() / page_size);
  BlockKey last = parent;
  for (size_t i = 0; i < keys.size(); ++i) {
    last = next_key(last, content.block(i, page_size));
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

Digest next_digest(const Digest& parent, const Block& block) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(block.tokens.data());
  const std::span words(bytes, block.tokens.size_bytes());
  if (!block.extras) return sha256(parent, words);
  std::vector<uint8_t> joined(words.begin(), words.end());
  joined.insert(joined.end(), block.extras->begin(), block.extras->end());
  return sha256(parent, joined);
}

}  // namespace kvc2
