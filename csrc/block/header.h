// The header sector of a page, and checks of whole pages. A page is one buffer in each tier: a
// sector of 4 KiB and then the payload. Its header says what the payload is, so that no page is
// believed for where it lies. Not responsible for where pages lie, nor for moving them.
//
// All integers are little-endian. A reserved field has one allowed value; another one means a
// writer that knows more than we do, and its block is a miss (kBadHeader).
//
//   offset bytes field             meaning
//        0     8 magic             "KVC2PAGE"
//        8     4 version           1
//       12     4 flags             reserved: 0
//       16    32 namespace         HMAC-SHA256(tenant secret, model identity)
//       48    32 digest            SHA-256(parent || words || extras; see block_key.h)
//       80    32 parent            digest of the block before; of a first block its namespace
//      112    16 key               xxh3_128 chain, canonical
//      128     4 key_mode          0: tokens name the block; 1: external_key does
//      132     4 component         reserved: 0 (full attention)
//      136     4 part              reserved: 0 \ part of parts: the range of layers and heads that
//      140     4 parts             reserved: 1 / the page holds, once tensor parallelism is built
//      144    32 layout            digest of the layout of the payload
//      176     4 page_size         tokens in a block of this layout, 1 to 512
//      180     4 external_bytes    key_mode 0: 0; key_mode 1: the length of external_key, 1 to 64
//      184    64 external_key      what its engine calls the block, then 0
//      248    32 extras            digest of the images that begin in it; 0: none
//      280     8 payload_bytes     after the header; the page's padding to 4096 is not counted
//      288     8 generation        of the page in its durable pool: one more at each reuse
//      296    16 payload_checksum  xxh3_128 of the payload, canonical
//      312    32 mac               reserved: 0 (that of a remote store lies after the payload)
//      344   680                   reserved: 0
//     1024  2048 tokens            page_size of u32, then 0; key_mode 1: 0
//     3072  1008                   reserved: 0
//     4080    16 checksum          xxh3_128 of bytes 0 to 4079, canonical
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvc2 {

constexpr size_t kHeaderBytes = 4096;
constexpr size_t kPayloadChecksumOffset = 296;
constexpr size_t kTokensMax = 512;  // of a block: the room for them in the header
constexpr size_t kExternalKeyMax = 64;

using Bytes16 = std::array<uint8_t, 16>;
using Bytes32 = std::array<uint8_t, 32>;

enum class BlockState : uint8_t {
  kOk,
  kBadHeader,   // magic, version, a reserved field or the header's checksum
  kOther,       // a sound header of another block, namespace or layout
  kStale,       // the generation is not the expected one
  kBadPayload,  // the payload's checksum
};

// What a page is expected, or is said, to hold.
struct BlockRecord {
  const uint8_t* name_space;         // 32
  const uint8_t* digest;             // 32
  const uint8_t* parent;             // 32
  const uint8_t* key;                // 16
  std::span<const uint32_t> tokens;  // of a block with an external key only their number counts
  uint64_t generation;
  std::span<const uint8_t> external_key{};  // empty: the tokens name the block
  const uint8_t* extras = nullptr;          // 32; null or zeros: none
};

struct PayloadShape {
  Bytes32 layout;  // digest of the layout
  uint64_t bytes;
};

// Writes the header at `page`, whose payload lies right after it. Returns the payload's checksum.
Bytes16 encode_header(uint8_t* page, const BlockRecord& record, const PayloadShape& payload);

// Believes nothing of the page but its length. What is wrong with several parts is named after the
// first of kBadHeader, kOther, kStale, kBadPayload.
BlockState verify_block(const uint8_t* page, const BlockRecord& record,
                        const PayloadShape& payload);

// What a header says, for who has no record of the block; the payload is not looked at. Returns
// false, and writes nothing, unless the header is sound, of this shape and page size, and of this
// generation. Into namespace, digest, parent and extras 32 bytes each, the payload's checksum 16,
// `page_size` tokens, and the external key with its length.
struct HeaderFields {
  uint8_t *name_space, *digest, *parent, *payload_checksum;
  std::span<uint32_t> tokens;
  uint8_t *external_bytes, *external_key, *extras;
};
bool read_header(const uint8_t* page, const PayloadShape& payload, uint64_t generation,
                 const HeaderFields& into);

}  // namespace kvc2
