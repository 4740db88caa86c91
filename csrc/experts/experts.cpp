#include "experts/experts.h"

namespace kvc2::experts {

Kernels kernels(Isa isa, bool packed) {
  switch (isa) {
    case Isa::kAmx:
      return packed ? kAmxPacked : kAmxKernels;
    case Isa::kAvx512Bf16:
      return packed ? kAvx512Bf16Packed : kAvx512Bf16Kernels;
    case Isa::kAvx512Vnni:
      return packed ? kAvx512VnniPacked : kAvx512Kernels;
    case Isa::kAvx512:
      return packed ? kAvx512Packed : kAvx512Kernels;
    case Isa::kAvx2:
      return packed ? kAvx2Packed : kAvx2Kernels;
    case Isa::kPortable:
      break;
  }
  return packed ? kPortablePacked : kPortableKernels;
}

}  // namespace kvc2::experts
