#include "block/header.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "base/sha256.h"
#include "base/xxh3.h"

namespace kvc2 {
namespace {

static_assert(std::endian::native == std::endian::little, "headers are little-endian");

struct Header {
  uint8_t magic[8];
  uint32_t version, flags;
  uint8_t name_space[32], digest[32], parent[32], key[16];
  uint32_t key_mode, component, part, parts;
  uint8_t layout[32];
  uint32_t page_size, external_bytes;
  uint8_t external_key[kExternalKeyMax], extras[32];
  uint64_t payload_bytes, generation;
  uint8_t payload_checksum[16], mac[32];
  uint8_t reserved_low[680];
  uint32_t tokens[kTokensMax];
  uint8_t reserved_high[1008];
  uint8_t checksum[16];
};
static_assert(sizeof(Header) == kHeaderBytes);
static_assert(offsetof(Header, name_space) == 16 && offsetof(Header, digest) == 48);
static_assert(offsetof(Header, parent) == 80 && offsetof(Header, key) == 112);
static_assert(offsetof(Header, key_mode) == 128 && offsetof(Header, layout) == 144);
static_assert(offsetof(Header, page_size) == 176 && offsetof(Header, external_key) == 184);
static_assert(offsetof(Header, extras) == 248 && offsetof(Header, payload_bytes) == 280);
static_assert(offsetof(Header, payload_checksum) == kPayloadChecksumOffset);
static_assert(offsetof(Header, mac) == 312);
static_assert(offsetof(Header, tokens) == 1024 && offsetof(Header, checksum) == 4080);

constexpr uint8_t kMagic[8] = {'K', 'V', 'C', '2', 'P', 'A', 'G', 'E'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kTokens = 0, kExternal = 1;  // key_mode

Bytes16 header_checksum(const Header& header) {
  return xxh3_128(&header, offsetof(Header, checksum));
}

// The header of an empty payload without its checksums: reserved fields at their one value.
Header header_of(const BlockRecord& record, const PayloadShape& payload) {
  KVC2_CHECK(!record.tokens.empty() && record.tokens.size() <= kTokensMax, "%zu tokens",
             record.tokens.size());
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  std::memcpy(header.name_space, record.name_space, sizeof header.name_space);
  std::memcpy(header.digest, record.digest, sizeof header.digest);
  std::memcpy(header.parent, record.parent, sizeof header.parent);
  std::memcpy(header.key, record.key, sizeof header.key);
  header.parts = 1;
  std::memcpy(header.layout, payload.layout.data(), sizeof header.layout);
  header.page_size = static_cast<uint32_t>(record.tokens.size());
  header.payload_bytes = payload.bytes;
  header.generation = record.generation;
  if (record.extras) std::memcpy(header.extras, record.extras, sizeof header.extras);
  if (record.external_key.empty()) {
    std::memcpy(header.tokens, record.tokens.data(), record.tokens.size_bytes());
    return header;
  }
  KVC2_CHECK(record.external_key.size() <= kExternalKeyMax, "a key of %zu bytes",
             record.external_key.size());
  header.key_mode = kExternal;
  header.external_bytes = static_cast<uint32_t>(record.external_key.size());
  std::memcpy(header.external_key, record.external_key.data(), record.external_key.size());
  return header;
}

bool equal(const uint8_t* a, const uint8_t* b, size_t bytes) {
  return std::memcmp(a, b, bytes) == 0;
}

bool all_zero(const auto& values) {
  return std::ranges::all_of(values, [](auto value) { return value == 0; });
}

// Tokens, or a key and zeros after it.
bool named_in_one_way(const Header& header) {
  const std::span<const uint8_t> key(header.external_key);
  if (header.key_mode == kTokens) return header.external_bytes == 0 && all_zero(key);
  return header.key_mode == kExternal && header.external_bytes > 0 &&
         header.external_bytes <= key.size() && all_zero(key.subspan(header.external_bytes)) &&
         all_zero(header.tokens);
}

bool reserved_as_allowed(const Header& header) {
  return header.flags == 0 && header.component == 0 && header.part == 0 && header.parts == 1 &&
         all_zero(header.mac) && all_zero(header.reserved_low) && all_zero(header.reserved_high);
}

bool sound(const Header& header) {
  if (!equal(header.magic, kMagic, sizeof kMagic) || header.version != kVersion) return false;
  const Bytes16 checksum = header_checksum(header);
  return equal(header.checksum, checksum.data(), checksum.size()) && reserved_as_allowed(header) &&
         named_in_one_way(header);
}

bool same_block(const Header& found, const Header& wanted) {
  return equal(found.name_space, wanted.name_space, sizeof wanted.name_space) &&
         equal(found.digest, wanted.digest, sizeof wanted.digest) &&
         equal(found.parent, wanted.parent, sizeof wanted.parent) &&
         equal(found.key, wanted.key, sizeof wanted.key) &&
         equal(found.layout, wanted.layout, sizeof wanted.layout) &&
         found.page_size == wanted.page_size && found.payload_bytes == wanted.payload_bytes &&
         found.key_mode == wanted.key_mode && found.external_bytes == wanted.external_bytes &&
         equal(found.external_key, wanted.external_key, sizeof wanted.external_key) &&
         equal(found.extras, wanted.extras, sizeof wanted.extras) &&
         std::memcmp(found.tokens, wanted.tokens, sizeof wanted.tokens) == 0;
}

}  // namespace

Bytes16 encode_header(uint8_t* page, const BlockRecord& record, const PayloadShape& payload) {
  Header header = header_of(record, payload);
  const Bytes16 payload_checksum = xxh3_128(page + kHeaderBytes, payload.bytes);
  std::memcpy(header.payload_checksum, payload_checksum.data(), payload_checksum.size());
  const Bytes16 checksum = header_checksum(header);
  std::memcpy(header.checksum, checksum.data(), checksum.size());
  std::memcpy(page, &header, sizeof header);
  return payload_checksum;
}

BlockState verify_block(const uint8_t* page, const BlockRecord& record,
                        const PayloadShape& payload) {
  Header found;
  std::memcpy(&found, page, sizeof found);
  if (!sound(found)) return BlockState::kBadHeader;
  if (!same_block(found, header_of(record, payload))) return BlockState::kOther;
  if (found.generation != record.generation) return BlockState::kStale;
  const Bytes16 checksum = xxh3_128(page + kHeaderBytes, payload.bytes);
  const bool intact = equal(found.payload_checksum, checksum.data(), checksum.size());
  return intact ? BlockState::kOk : BlockState::kBadPayload;
}

bool read_header(const uint8_t* page, const PayloadShape& payload, uint64_t generation,
                 const HeaderFields& into) {
  Header found;
  std::memcpy(&found, page, sizeof found);
  if (!sound(found) || found.generation != generation) return false;
  if (!equal(found.layout, payload.layout.data(), sizeof found.layout)) return false;
  if (found.payload_bytes != payload.bytes || found.page_size != into.tokens.size()) return false;
  std::memcpy(into.name_space, found.name_space, sizeof found.name_space);
  std::memcpy(into.digest, found.digest, sizeof found.digest);
  std::memcpy(into.parent, found.parent, sizeof found.parent);
  std::memcpy(into.payload_checksum, found.payload_checksum, sizeof found.payload_checksum);
  std::memcpy(into.tokens.data(), found.tokens, into.tokens.size_bytes());
  *into.external_bytes = static_cast<uint8_t>(found.external_bytes);
  std::memcpy(into.external_key, found.external_key, sizeof found.external_key);
  std::memcpy(into.extras, found.extras, sizeof found.extras);
  return true;
}

}  // namespace kvc2
