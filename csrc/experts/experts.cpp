#include "experts/experts.h"

namespace kvc2::experts {

Kernels kernels(Isa isa) {
  return chosen(isa, kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAmxKernels);
}

}  // namespace kvc2::experts
