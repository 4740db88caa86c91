// SHA-256 (FIPS 180-4): the name of a block on disk and remote. Uses the processor's SHA extensions
// where it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvc2 {

std::array<uint8_t, 32> sha256(std::span<const uint8_t> data);

// Of `first` followed by `second`, without joining them: a digest and the tokens after it.
std::array<uint8_t, 32> sha256(std::span<const uint8_t> first, std::span<const uint8_t> second);

}  // namespace kvc2
