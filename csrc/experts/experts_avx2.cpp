#include "experts/rows_product.h"

namespace kvc2::experts {

const Kernels kAvx2Kernels = FloatKernels<32, 4>::kernels;

}  // namespace kvc2::experts
