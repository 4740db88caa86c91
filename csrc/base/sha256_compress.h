// The compression function of SHA-256, once portable and once with the SHA extensions. sha256_shani
// is compiled for instructions that the machine may lack: no inline function of the standard
// library there, since the linker could keep its copy for everyone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvc2::sha {

constexpr size_t kBlockBytes = 64;

extern const uint32_t kRound[64];  // FIPS 180-4, 4.2.2

// Takes `blocks` blocks of 64 bytes into `state`, words a to h.
using Compress = void (*)(uint32_t state[8], const uint8_t* data, size_t blocks);
void compress_portable(uint32_t state[8], const uint8_t* data, size_t blocks);
void compress_shani(uint32_t state[8], const uint8_t* data, size_t blocks);

}  // namespace kvc2::sha
