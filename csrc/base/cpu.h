// What this machine can run: the instruction sets that both the processor and the system offer.
// Not responsible for choosing a kernel: each kernel asks here once and keeps a function pointer.
#pragma once

#include <string_view>

namespace kvc2 {

// Each level includes the ones before it.
//   kPortable    any x86-64
//   kAvx2        AVX2, FMA, F16C
//   kAvx512      F, BW, VL, DQ
//   kAvx512Vnni  and VNNI: products of bytes (Cascade Lake, Ice Lake)
//   kAvx512Bf16  and BF16: products of bfloat16 (Cooper Lake, Zen 4)
//   kAmx         and tiles with BF16 and INT8, which the kernel lets us use (Sapphire Rapids)
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };

struct Cpu {
  Isa isa = Isa::kPortable;
  bool sha_ni = false;  // SHA extensions, with SSSE3 and SSE4.1
};

// Detected at the first call, then constant. The environment variable KVC2_ISA (a word of
// isa_name) lowers the level for tests and never raises it; features that belong to a higher level
// go with it (sha_ni counts as avx2). Throws std::invalid_argument for another word.
const Cpu& cpu();

// The word of KVC2_ISA for a level.
std::string_view isa_name(Isa isa);

// Of the same thing made for some of the levels, the one for `isa`.
template <class T>
const T& chosen(Isa isa, const T& portable, const T& avx2, const T& avx512, const T& amx) {
  if (isa >= Isa::kAmx) return amx;
  if (isa >= Isa::kAvx512) return avx512;
  return isa >= Isa::kAvx2 ? avx2 : portable;
}

}  // namespace kvc2
