// Headers: what is written is believed, and no changed bit of header or payload is.
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "base/sha256.h"
#include "base/xxh3.h"
#include "block/header.h"
#include "expect.h"

namespace {

using namespace kvc2;

constexpr size_t kPayloadBytes = 777;

struct Block {
  explicit Block(size_t page_size) : tokens(page_size), page(kHeaderBytes + kPayloadBytes) {
    for (size_t i = 0; i < page_size; ++i) tokens[i] = static_cast<uint32_t>(i * 2654435761u);
    for (size_t i = 0; i < page.size(); ++i) page[i] = static_cast<uint8_t>(i * 37);
    name_space.fill(1), digest.fill(2), parent.fill(3), key.fill(4), shape.layout.fill(5);
  }
  BlockRecord record() const {
    return {name_space.data(), digest.data(), parent.data(), key.data(), tokens, generation, {},
            extras.data()};
  }
  BlockState verify() const { return verify_block(page.data(), record(), shape); }
  void encode() { encode_header(page.data(), record(), shape); }

  std::vector<uint32_t> tokens;
  std::vector<uint8_t> page;
  Bytes32 name_space, digest, parent, extras{};
  Bytes16 key;
  uint64_t generation = 9;
  PayloadShape shape{{}, kPayloadBytes};
};

void what_is_encoded_is_believed() {
  for (const size_t page_size : {1, 16, 512}) {
    Block block(page_size);
    block.encode();
    EXPECT(block.verify() == BlockState::kOk);
    EXPECT(encode_header(block.page.data(), block.record(), block.shape) ==
           xxh3_128(block.page.data() + kHeaderBytes, kPayloadBytes));
  }
}

void no_flipped_bit_is_believed() {
  Block block(16);
  block.encode();
  for (size_t byte = 0; byte < block.page.size(); ++byte) {
    block.page[byte] ^= 0x10;
    const BlockState expected =
        byte < kHeaderBytes ? BlockState::kBadHeader : BlockState::kBadPayload;
    EXPECT(block.verify() == expected);
    block.page[byte] ^= 0x10;
  }
  EXPECT(block.verify() == BlockState::kOk);
}

// A writer that knows a later format makes sound checksums.
void seal(std::vector<uint8_t>& page) {
  const Bytes16 checksum = xxh3_128(page.data(), 4080);
  std::memcpy(page.data() + 4080, checksum.data(), checksum.size());
}

void a_reserved_field_has_one_value() {
  Block block(16);
  block.encode();
  // magic, version, flags, key_mode, component, part, parts, external_bytes, external_key, mac, and
  // what has no name yet
  for (const size_t offset :
       {0, 8, 12, 128, 132, 136, 140, 180, 184, 247, 312, 343, 344, 1023, 3072, 4079}) {
    std::vector<uint8_t> page = block.page;
    page[offset] ^= 1;
    seal(page);
    EXPECT(verify_block(page.data(), block.record(), block.shape) == BlockState::kBadHeader);
  }
}

void a_key_stands_in_the_place_of_tokens() {
  Block block(16);
  const std::vector<uint8_t> key(7, 'k');
  BlockRecord record = block.record();
  record.external_key = key;
  encode_header(block.page.data(), record, block.shape);
  EXPECT(verify_block(block.page.data(), record, block.shape) == BlockState::kOk);
  EXPECT(block.verify() == BlockState::kOther);
  // key_mode 0 and 2, no length, one too long, something after the key, a token
  const std::pair<size_t, uint8_t> wrong[] = {{128, 1}, {128, 3}, {180, 7}, {180, 7 ^ 65},
                                              {191, 1}, {247, 1}, {1024, 1}};
  for (const auto& [offset, flip] : wrong) {
    std::vector<uint8_t> page = block.page;
    page[offset] ^= flip;
    seal(page);
    EXPECT(verify_block(page.data(), record, block.shape) == BlockState::kBadHeader);
  }
}

void a_sound_header_of_something_else_is_told_apart() {
  Block block(16);
  block.encode();
  const auto is_other = [&](auto change) {
    Block wanted = block;
    change(wanted);
    EXPECT(verify_block(block.page.data(), wanted.record(), wanted.shape) == BlockState::kOther);
  };
  is_other([](Block& b) { b.name_space[31] ^= 1; });
  is_other([](Block& b) { b.digest[0] ^= 1; });
  is_other([](Block& b) { b.parent[0] ^= 1; });
  is_other([](Block& b) { b.key[15] ^= 1; });
  is_other([](Block& b) { b.shape.layout[7] ^= 1; });
  is_other([](Block& b) { b.shape.bytes -= 1; });
  is_other([](Block& b) { b.tokens[15] += 1; });
  is_other([](Block& b) { b.tokens.resize(8); });
  is_other([](Block& b) { b.extras[31] = 1; });
  Block later = block;
  later.generation += 1;
  EXPECT(later.verify() == BlockState::kStale);
  later.digest[0] ^= 1;
  EXPECT(later.verify() == BlockState::kOther);
}

}  // namespace

int main() {
  what_is_encoded_is_believed();
  no_flipped_bit_is_believed();
  a_reserved_field_has_one_value();
  a_key_stands_in_the_place_of_tokens();
  a_sound_header_of_something_else_is_told_apart();
  return failures == 0 ? 0 : 1;
}
