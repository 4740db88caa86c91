// As with VNNI alone, but of bfloat16 inputs fp8 by vdpbf16ps.
#include "experts/fp8_pairs.h"
#include "experts/vnni.h"

namespace kvc2::experts {
namespace {

using Bf16 = PackedKernels<VnniBytes, VnniBytes, WideFp8<64>, Bf16Fp8, 8, 2>;

}  // namespace

const Kernels kAvx512Bf16Packed = {Bf16::linear, Bf16::ffn};

}  // namespace kvc2::experts
