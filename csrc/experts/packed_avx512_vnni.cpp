#include "experts/vnni.h"

namespace kvc2::experts {
namespace {

using Vnni = PackedKernels<VnniBytes, VnniBytes, WideFp8<64>, WideFp8<64>, 8, 2>;

}  // namespace

const Kernels kAvx512VnniPacked = {Vnni::linear, Vnni::ffn};

}  // namespace kvc2::experts
