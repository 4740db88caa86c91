// ARC (Megiddo and Modha, FAST 2003) on leaves. A block is *recent* until a second request uses it,
// then *frequent*. Each pool keeps a target for its share of recent pages: when a block comes back
// soon after its eviction, the share of its kind was too small. The victim is the least recently
// used leaf of the kind that is over its share, or of the other kind if that one has no leaf.
#include <algorithm>
#include <vector>

#include "index/eviction/ghosts.h"
#include "index/eviction/policies.h"

namespace kvc2 {

namespace {

constexpr uint32_t kRecent = 0, kFrequent = 1;  // marks, and queues

class Arc final : public EvictionPolicy {
 public:
  Use added(const BlockKey&, const Use*, uint32_t stamp) override { return {stamp, kRecent}; }
  void touched(const BlockKey&, Use& use, uint32_t stamp) override { use = {stamp, kFrequent}; }

  bool counts_pages() const override { return true; }

  void placed(PoolId pool, const BlockKey& key, Use& use) override {
    Shares& of = shares(pool);
    if (const auto frequent = of.ghosts.take(key)) {
      const double recents = std::max(of.ghosts.count(kRecent), 1u);
      const double frequents = std::max(of.ghosts.count(kFrequent), 1u);
      const double step =
          *frequent ? -std::max(recents / frequents, 1.0) : std::max(frequents / recents, 1.0);
      of.recent_target = std::clamp(of.recent_target + step, 0.0, double(of.pages));
      use.mark = kFrequent;
    }
    ++of.held[use.mark];
  }

  void cleared(PoolId pool, const BlockKey& key, const Use& use) override {
    --shares(pool).held[use.mark];
    shares(pool).ghosts.remember(key, use.mark == kFrequent);
  }

  void marked(PoolId pool, const Use& from, const Use& to) override {
    --shares(pool).held[from.mark];
    ++shares(pool).held[to.mark];
  }

  uint32_t held(PoolId pool, uint32_t queue) const override {
    return pool < shares_.size() ? shares_[pool].held[queue] : 0;
  }

  Queued queued(const Use& use) const override { return {use.mark, use.stamp}; }

  uint32_t queues() const override { return 2; }

  std::optional<EvictionOrder::Entry> choose(PoolId pool, const EvictionOrder& order) override {
    const Shares& of = shares(pool);
    const uint32_t queue = of.held[kRecent] > of.recent_target ? kRecent : kFrequent;
    const auto victim = order.oldest(queue);
    return victim ? victim : order.first();
  }

  void resize(PoolId pool, uint32_t pages) override {
    Shares& of = shares(pool);
    of.pages = pages;
    of.recent_target = std::min(of.recent_target, double(pages));
    of.ghosts.resize(pages);
  }

  size_t metadata_bytes() const override {
    size_t bytes = shares_.capacity() * sizeof(Shares);
    for (const Shares& of : shares_) bytes += of.ghosts.metadata_bytes();
    return bytes;
  }

 private:
  struct Shares {
    uint32_t pages = 0;
    double recent_target = 0;  // pages
    uint32_t held[2] = {0, 0};
    Ghosts ghosts;  // flagged where they were frequent
  };

  Shares& shares(PoolId pool) {
    if (pool >= shares_.size()) shares_.resize(pool + 1);
    return shares_[pool];
  }

  std::vector<Shares> shares_;  // by pool
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_arc() { return std::make_unique<Arc>(); }

}  // namespace kvc2
