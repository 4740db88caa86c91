#include "base/cpu.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kvc2 {
namespace {

constexpr std::array<std::string_view, 6> kNames = {"portable",    "avx2",        "avx512",
                                                    "avx512_vnni", "avx512_bf16", "amx"};

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool all_bits(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

constexpr uint64_t bit(int n) { return uint64_t{1} << n; }

// XCR0: which register files the system saves on a context switch (Intel SDM volume 1, 13.3).
uint64_t saved_state() {
  if (!all_bits(cpuid(1, 0).ecx, bit(27))) return 0;  // OSXSAVE
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux hands out tile data only to a process that asks (Documentation/arch/x86/xstate.rst).
bool tiles_allowed() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Feature bits: Intel SDM volume 2A, CPUID.
Cpu detect() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const uint64_t saved = saved_state();
  const bool ymm = all_bits(saved, bit(1) | bit(2));
  const bool zmm = ymm && all_bits(saved, bit(5) | bit(6) | bit(7));
  Cpu found;
  found.sha_ni = all_bits(seven.ebx, bit(29)) && all_bits(one.ecx, bit(9) | bit(19));
  // AVX2 on the second leaf; AVX, FMA and F16C on the first
  if (!ymm || !all_bits(seven.ebx, bit(5)) || !all_bits(one.ecx, bit(28) | bit(12) | bit(29))) {
    return found;
  }
  found.isa = Isa::kAvx2;
  // F, DQ, BW, VL
  if (!zmm || !all_bits(seven.ebx, bit(16) | bit(17) | bit(30) | bit(31))) return found;
  found.isa = Isa::kAvx512;
  if (!all_bits(seven.ecx, bit(11))) return found;
  found.isa = Isa::kAvx512Vnni;
  if (!all_bits(seven_one.eax, bit(5))) return found;
  found.isa = Isa::kAvx512Bf16;
  // VBMI; AMX-BF16, AMX-TILE, AMX-INT8; tile configuration and data saved
  if (all_bits(seven.ecx, bit(1)) && all_bits(seven.edx, bit(22) | bit(24) | bit(25)) &&
      all_bits(saved, bit(17) | bit(18)) && tiles_allowed()) {
    found.isa = Isa::kAmx;
  }
  return found;
}

Cpu lower(Cpu found, std::string_view wanted) {
  const auto at = std::find(kNames.begin(), kNames.end(), wanted);
  if (at == kNames.end()) {
    throw std::invalid_argument("KVC2_ISA is '" + std::string(wanted) +
                                "'; it may be portable, avx2, avx512, avx512_vnni, "
                                "avx512_bf16 or amx");
  }
  found.isa = std::min(found.isa, static_cast<Isa>(at - kNames.begin()));
  found.sha_ni = found.sha_ni && found.isa > Isa::kPortable;
  return found;
}

}  // namespace

const Cpu& cpu() {
  static const Cpu known = [] {
    const char* wanted = std::getenv("KVC2_ISA");
    return wanted == nullptr ? detect() : lower(detect(), wanted);
  }();
  return known;
}

std::string_view isa_name(Isa isa) { return kNames[static_cast<size_t>(isa)]; }

}  // namespace kvc2
