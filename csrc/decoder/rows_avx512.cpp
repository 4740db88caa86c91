#include "decoder/rows.h"

namespace kvc2::decoder {

const Kernels kAvx512Kernels = kTheseKernels;

}  // namespace kvc2::decoder
