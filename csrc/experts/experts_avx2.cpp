#include "experts/float_product.h"

namespace kvc2::experts {

const Kernels kAvx2Kernels = FloatKernels<5, 10>::kernels;

}  // namespace kvc2::experts
