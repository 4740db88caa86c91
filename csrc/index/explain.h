// Why the first missing block of a prompt is not there. Changes nothing.
#pragma once

#include "index/explanation.h"
#include "index/match.h"

namespace kvc2 {

constexpr uint32_t kSiblingsMax = 4096;  // 0.4 ms; the newest branches are looked at

// `found` are leading blocks of `prompt`. At most `siblings` blocks that stand where the missing
// one would are compared with it.
Explanation explanation_of(const RadixTree& tree, const Obituaries& dead, const Found& found,
                           const Content& prompt, uint32_t siblings);

}  // namespace kvc2
