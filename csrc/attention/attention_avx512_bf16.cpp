// bfloat16 in products of pairs, summed in float32. The weights are rounded to bfloat16.
#include <immintrin.h>

#include "attention/lanes_math.h"
#include "attention/pairs.h"

namespace kvc2::attention {
namespace {

struct AddPairs : Pairs {
  static Lanes add(Lanes sum, Lanes a, Lanes b) {
    return reinterpret_cast<Lanes>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                    reinterpret_cast<__m512bh>(a),
                                                    reinterpret_cast<__m512bh>(b)));
  }
};

struct PairsMath : Pairs, Products<AddPairs> {
  using Pairs::Element;
};

void pairs_attend(const Attend& call, Workspace& workspace) {
  call.type == Type::kBfloat16 ? attend<PairsMath>(call, workspace)
                               : kAvx512Kernels.attend(call, workspace);
}

}  // namespace

const Kernels kAvx512Bf16Kernels = {pairs_attend};

}  // namespace kvc2::attention
