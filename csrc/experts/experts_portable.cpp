#include "experts/rows_product.h"

namespace kvc2::experts {

const Kernels kPortableKernels = FloatKernels<16, 2>::kernels;

}  // namespace kvc2::experts
