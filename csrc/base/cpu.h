// What this machine can run: the instruction sets that both the processor and the system offer.
// Not responsible for choosing a kernel: each kernel asks here once and keeps a function pointer.
#pragma once

#include <string_view>

namespace kvc2 {

// Widest first choice of a kernel. Each level includes the ones before it.
//   kPortable  any x86-64
//   kAvx2      AVX2, FMA, F16C
//   kAvx512    F, BW, VL, DQ
//   kAmx       kAvx512, AVX512-BF16, and tiles with BF16 and INT8, which the kernel lets us use
enum class Isa { kPortable, kAvx2, kAvx512, kAmx };

struct Cpu {
  Isa isa = Isa::kPortable;
  bool avx512_bf16 = false;  // some machines of level kAvx512 lack it
  bool sha_ni = false;       // SHA extensions, with SSSE3 and SSE4.1
};

// Detected at the first call, then constant. The environment variable KVC2_ISA (portable, avx2,
// avx512, amx) lowers the level for tests and never raises it; features that belong to a higher
// level go with it (sha_ni counts as avx2). Throws std::invalid_argument for another word.
const Cpu& cpu();

// The word of KVC2_ISA for a level.
std::string_view isa_name(Isa isa);

// Of the same thing made for each level, the one for `isa`.
template <class T>
const T& chosen(Isa isa, const T& portable, const T& avx2, const T& avx512, const T& amx) {
  switch (isa) {
    case Isa::kAmx:
      return amx;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    case Isa::kPortable:
      break;
  }
  return portable;
}

}  // namespace kvc2
