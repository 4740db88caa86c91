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

// For tests: worths that everybody can tell, the lowest three bits of a key. What is worth least
// goes first, and of that what lru would take.
class ByKey final : public EvictionPolicy {
 public:
  Use added(const BlockKey& key, const Use*, uint32_t stamp) override { return {stamp, mark(key)}; }
  void touched(const BlockKey&, Use& use, uint32_t stamp) override { use.stamp = stamp; }
  std::vector<uint32_t> asked(std::span<const BlockKey> keys, const Use*, uint32_t) override {
    std::vector<uint32_t> marks;
    for (const BlockKey& key : keys) marks.push_back(mark(key));
    return marks;
  }
  std::optional<float> worth(const Use& use) override { return static_cast<float>(use.mark); }
  Queued queued(const Use& use) const override { return {use.mark, use.stamp}; }
  uint32_t queues() const override { return 8; }
  Use restored(uint32_t stamp) const override { return {stamp, 0}; }

 private:
  static uint32_t mark(const BlockKey& key) { return key[0] & 7U; }
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru() { return std::make_unique<Lru>(); }

std::unique_ptr<EvictionPolicy> make_policy(std::string_view name, uint64_t seed) {
  if (name == "lru") return make_lru();
  if (name == "by_key") return std::make_unique<ByKey>();
  if (name == "arc") return make_arc();
  if (name == "s3fifo") return make_s3fifo();
  if (name == "hazard") return make_hazard(seed);
  throw std::invalid_argument("policy: " + std::string(name) +
                              " is none of lru, arc, s3fifo, hazard");
}

}  // namespace kvc2
