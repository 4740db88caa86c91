#include "experts/rows_product.h"

namespace kvc2::experts {

const Kernels kAvx512Kernels = FloatKernels<64, 16>::kernels;

}  // namespace kvc2::experts
