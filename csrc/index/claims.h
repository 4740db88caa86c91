// What open leases and transfers say of the pages that they use: I4 and I7 hold where this agrees
// with what the pools say. For `check` alone.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "index/page_pool.h"

namespace kvc2 {

struct Claim {
  uint32_t pins = 0;
  uint32_t held = 0;      // duplicates of leases, and pages that moves fill
  uint32_t arriving = 0;  // transfers that fill it
};

class Claims {
 public:
  Claim& of(PoolId pool, PageId page) { return claims_[name_of(pool, page)]; }

 private:
  std::unordered_map<uint64_t, Claim> claims_;
};

}  // namespace kvc2
