// S3-FIFO (Yang et al., SOSP 2023) on leaves. A new block enters the *small* queue, a tenth of its
// pool. If it is used twice more there, it moves to the *main* queue; else it is evicted, and
// enters main if it comes back soon. A leaf of main that was used since it entered goes round
// again. The order is that of entry: a use counts, but does not move the block.
//
// A request uses a whole path, and only leaves can be evicted. A hand that goes round a queue of
// single objects would meet most blocks late, when all that hangs on them has gone. So what the
// hand would have done is done when it was due. A block moves to main at the use that earns it,
// not when it becomes a leaf: else `small` would be full of blocks that earned main long ago. And
// a leaf that goes round again enters as of its last use, not as of now: else the bodies of
// sessions that are over would stand above the tails of those that go on.
#include <algorithm>
#include <vector>

#include "index/eviction/ghosts.h"
#include "index/eviction/policies.h"

namespace kvc2 {

namespace {

constexpr uint32_t kSmall = 0, kMain = 1;  // queues
constexpr uint32_t kUsesToMain = 2;
constexpr double kSmallShare = 0.1;

// A mark: uses since entry, at most kUsesToMain (2 bits), queue (1), an eighth of the acquire of
// entry (29). Where the block was not used since, the Use's stamp is that acquire, exactly.
struct Mark {
  uint32_t uses, queue, entered;

  static Mark of(const Use& use) { return {use.mark & 3, use.mark >> 2 & 1, use.mark >> 3}; }
  uint32_t packed() const { return entered << 3 | queue << 2 | uses; }
};

class S3Fifo final : public EvictionPolicy {
 public:
  Use added(const BlockKey&, const Use*, uint32_t stamp) override { return entering(stamp); }
  Use restored(uint32_t stamp) const override { return entering(stamp); }

  void touched(const BlockKey&, Use& use, uint32_t stamp) override {
    Mark mark = Mark::of(use);
    mark.uses = std::min(mark.uses + 1, kUsesToMain);
    if (mark.queue == kSmall && mark.uses == kUsesToMain) mark = {0, kMain, stamp >> 3};
    use = {stamp, mark.packed()};
  }

  bool counts_pages() const override { return true; }

  void placed(PoolId pool, const BlockKey& key, Use& use) override {
    Mark mark = Mark::of(use);
    if (queues(pool).ghosts.take(key)) mark.queue = kMain;
    use.mark = mark.packed();
    ++queues(pool).held[mark.queue];
  }

  void cleared(PoolId pool, const BlockKey& key, const Use& use) override {
    const uint32_t queue = Mark::of(use).queue;
    --queues(pool).held[queue];
    if (queue == kSmall) queues(pool).ghosts.remember(key, false);
  }

  void marked(PoolId pool, const Use& from, const Use& to) override {
    --queues(pool).held[Mark::of(from).queue];
    ++queues(pool).held[Mark::of(to).queue];
  }

  uint32_t held(PoolId pool, uint32_t queue) const override {
    return pool < queues_.size() ? queues_[pool].held[queue] : 0;
  }

  Queued queued(const Use& use) const override {
    const Mark mark = Mark::of(use);
    return {mark.queue, mark.uses == 0 ? use.stamp : mark.entered << 3};
  }

  uint32_t queues() const override { return 2; }

  std::optional<EvictionOrder::Entry> choose(PoolId pool, const EvictionOrder& order) override {
    const Queues& of = queues(pool);
    const auto victim = order.oldest(of.held[kSmall] > kSmallShare * of.pages ? kSmall : kMain);
    return victim ? victim : order.first();
  }

  bool spares(PoolId, Use& use) override {
    Mark mark = Mark::of(use);
    if (mark.queue == kSmall || mark.uses == 0) return false;
    use.mark = Mark{0, kMain, use.stamp >> 3}.packed();
    return true;
  }

  void resize(PoolId pool, uint32_t pages) override {
    queues(pool).pages = pages;
    queues(pool).ghosts.resize(pages);
  }

  void halve(Use& use) const override {
    Mark mark = Mark::of(use);
    mark.entered /= 2;
    use = {use.stamp / 2, mark.packed()};
  }

  size_t metadata_bytes() const override {
    size_t bytes = queues_.capacity() * sizeof(Queues);
    for (const Queues& of : queues_) bytes += of.ghosts.metadata_bytes();
    return bytes;
  }

 private:
  struct Queues {
    uint32_t pages = 0;
    uint32_t held[2] = {0, 0};
    Ghosts ghosts;
  };

  Use entering(uint32_t stamp) const { return {stamp, Mark{0, kSmall, stamp >> 3}.packed()}; }

  Queues& queues(PoolId pool) {
    if (pool >= queues_.size()) queues_.resize(pool + 1);
    return queues_[pool];
  }

  std::vector<Queues> queues_;  // by pool
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_s3fifo() { return std::make_unique<S3Fifo>(); }

}  // namespace kvc2
