#include "attention/lanes_math.h"

namespace kvc2::attention {

const Kernels kPortableKernels = {lanes_attend};

}  // namespace kvc2::attention
