// XXH3, 128 bits, seed 0, default secret: the finger of a block in memory and the checksum of
// headers and payloads. Written from the specification, doc/xxhash_spec.md of the xxHash project
// (version 0.8). Not a defence against an adversary: that is sha256.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvc2 {

// Canonical form: the big-endian number high64 || low64.
std::array<uint8_t, 16> xxh3_128(const void* data, size_t bytes);

}  // namespace kvc2
