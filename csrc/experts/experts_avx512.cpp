#include "experts/float_product.h"

namespace kvc2::experts {

const Kernels kAvx512Kernels = FloatKernels<4, 16>::kernels;

}  // namespace kvc2::experts
