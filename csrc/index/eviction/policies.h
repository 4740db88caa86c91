// The policies there are; each is one file. See policy.h for what one must do.
#pragma once

#include "index/eviction/policy.h"

namespace kvc2 {

std::unique_ptr<EvictionPolicy> make_lru();
std::unique_ptr<EvictionPolicy> make_arc();
std::unique_ptr<EvictionPolicy> make_s3fifo();
std::unique_ptr<EvictionPolicy> make_hazard(uint64_t seed);

}  // namespace kvc2
