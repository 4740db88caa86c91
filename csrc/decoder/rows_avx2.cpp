#include "decoder/rows.h"

namespace kvc2::decoder {

const Kernels kAvx2Kernels = kTheseKernels;

}  // namespace kvc2::decoder
