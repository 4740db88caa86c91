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
// avx512, amx) lowers the level for tests, never raises it; `portable` drops sha_ni too, and
// anything below amx leaves avx512_bf16 as the processor has it only at avx512 and above.
// Throws std::invalid_argument when KVC2_ISA holds another word.
const Cpu& cpu();

// The word of KVC2_ISA for a level.
std::string_view isa_name(Isa isa);

}  // namespace kvc2
