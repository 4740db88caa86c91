#include "experts/lanes_product.h"

namespace kvc2::experts {

const Kernels kAvx512Kernels = {lanes_linear, lanes_ffn};

}  // namespace kvc2::experts
