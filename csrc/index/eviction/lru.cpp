// Least recently used. A path is used whole, so its tail goes first: only leaves are ever ranked.
#include <stdexcept>
#include <string>

#include "index/eviction/policies.h"

namespace kvc2 {

namespace {

class Lru final : public EvictionPolicy {
 public:
  Use added(const BlockKey&, const Use*, uint32_t stamp) override { return {stamp}; }
  void touched(const BlockKey&, Use& use, uint32_t stamp) override { use.stamp = stamp; }
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru() { return std::make_unique<Lru>(); }

std::unique_ptr<EvictionPolicy> make_policy(std::string_view name, uint64_t seed) {
  if (name == "lru") return make_lru();
  if (name == "arc") return make_arc();
  if (name == "s3fifo") return make_s3fifo();
  if (name == "hazard") return make_hazard(seed);
  throw std::invalid_argument("policy: " + std::string(name) +
                              " is none of lru, arc, s3fifo, hazard");
}

}  // namespace kvc2
