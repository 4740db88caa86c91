#include "attention/lanes_math.h"

namespace kvc2::attention {

const Kernels kAvx512Kernels = {lanes_attend};

}  // namespace kvc2::attention
