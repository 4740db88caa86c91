#include "experts/packed_product.h"

namespace kvc2::experts {
namespace {

using Bytes = PairBytes<PlainPairs>;
using Portable = PackedKernels<Bytes, Bytes, WideFp8<16>, WideFp8<16>, 1, 1>;

}  // namespace

const Kernels kPortablePacked = {Portable::linear, Portable::ffn};

}  // namespace kvc2::experts
