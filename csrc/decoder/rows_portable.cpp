#include "decoder/rows.h"

namespace kvc2::decoder {

const Kernels kPortableKernels = kTheseKernels;

}  // namespace kvc2::decoder
