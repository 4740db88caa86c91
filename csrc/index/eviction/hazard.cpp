// The default policy: evict the page that is worth least, as reuse_model.h learns it from traffic.
//
// The class of a block tells how often it was used: once, 2-3, 4-7, 8-15 or 16-31 times. A block
// that was used once has one of four classes, by the uses that its parent had from other requests:
// none (or no parent) for a prompt that nobody has sent before, one for the next turn of a
// conversation, 2-3 or more for a new conversation under a shared prompt. All blocks that one
// request adds to a path are of the class of the first of them. A block that comes back after all
// pools forgot it has the uses that the model remembers (of three blocks in 16), and so have the
// blocks that are added below it.
//
// A cell is a class and a quarter of an octave of age. The victim is the oldest leaf of the cell
// that is worth least among the cells with a leaf. The worth of a cell changes only when the model
// learns. Until a block has come back, nothing tells the classes apart, and the victim is LRU's.
#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "index/eviction/policies.h"
#include "index/eviction/reuse_model.h"

namespace kvc2 {

namespace {

constexpr uint32_t kUsesMax = 31;  // more uses are of no other class
constexpr uint32_t kHungOn = 4;    // classes of blocks used once
constexpr uint32_t kCells = 4;     // of an octave

// A mark: uses (8 bits), class if they are one (2), whether no request used it since it was added.
struct Mark {
  uint32_t uses = 1, hung_on = 0;
  bool fresh = false;

  static Mark of(const Use& use) {
    return {use.mark & 0xFF, use.mark >> 8 & 3, (use.mark >> 10 & 1) != 0};
  }
  uint32_t packed() const { return uint32_t{fresh} << 10 | hung_on << 8 | uses; }

  uint32_t group() const {
    if (uses <= 1) return hung_on;
    return kHungOn - 2 + static_cast<uint32_t>(std::bit_width(uses));  // 2-3, 4-7, 8-15, 16-31
  }
};

static_assert(kHungOn - 2 + 5 < ReuseModel::kClasses);

class Hazard final : public EvictionPolicy {
 public:
  explicit Hazard(uint64_t seed) : model_(seed) {}

  Use added(const BlockKey& key, const Use* parent, uint32_t stamp) override {
    const Mark above = parent ? Mark::of(*parent) : Mark{};
    Mark mark = above.fresh ? above : hung_on(parent, stamp);
    if (model_.watches(key)) {
      const auto known = model_.known(key);
      const bool told = known.when >= stamp;  // when it was asked for
      mark.uses = told ? known.uses : std::min(known.uses + 1, kUsesMax);
      if (!told) model_.use(key, stamp, mark.uses, mark.group());
    }
    now_ = std::max(now_, stamp);
    return {stamp, mark.packed()};
  }

  // Below a block of a path that is remembered none was used more often than that one. So a block
  // whose uses are not remembered has at least those of the most used one below it.
  std::vector<uint32_t> asked(std::span<const BlockKey> keys, const Use* parent,
                              uint32_t stamp) override {
    std::vector<uint32_t> packed(keys.size());
    std::vector<size_t> watched;
    Mark mark = hung_on(parent, stamp);
    for (size_t i = 0; i < keys.size(); ++i) {
      if (!model_.watches(keys[i])) continue;
      watched.push_back(i);
      model_.fetch(keys[i]);  // each is a wait for memory, but not one after the other
    }
    for (size_t i = 0, next = 0; i < keys.size(); ++i) {
      if (next < watched.size() && watched[next] == i) {
        mark.uses = std::min(model_.known(keys[i]).uses + 1, kUsesMax);
        ++next;
      }
      packed[i] = mark.packed();
    }
    uint32_t most = 1;
    for (size_t i = keys.size(), next = watched.size(); i-- > 0;) {
      mark = Mark::of({.mark = packed[i]});
      if (next > 0 && watched[next - 1] == i) {
        most = std::max(most, mark.uses);
        --next;
      }
      mark.uses = std::max(mark.uses, most);
      packed[i] = mark.packed();
    }
    for (const size_t i : watched) {
      mark = Mark::of({.mark = packed[i]});
      model_.miss(keys[i], stamp, mark.uses, mark.group());
    }
    now_ = std::max(now_, stamp);
    return packed;
  }

  void expected(Use& use, uint32_t mark) override {
    Mark known = Mark::of(use);
    if (!known.fresh) return;
    known.uses = std::max(known.uses, Mark::of({.mark = mark}).uses);
    use.mark = known.packed();
  }

  std::optional<float> worth(const Use& use) override {
    model_.catch_up();
    if (!model_.saw_returns()) return std::nullopt;
    const uint32_t group = Mark::of(use).group();
    const uint32_t age = now_ - std::min(now_, use.stamp);
    if (age < 2) return model_.worth(group, 0);
    const auto octave = static_cast<uint32_t>(std::bit_width(age)) - 1;
    const float here = model_.worth(group, octave);
    const float next = model_.worth(group, std::min(octave + 1, ReuseModel::kAges - 1));
    return here + (next - here) * (static_cast<float>(age) / static_cast<float>(1U << octave) - 1);
  }

  void refused(uint8_t tier, const BlockKey& key) override {
    if (model_.watches(key)) model_.refuse(key, tier);
  }

  Regret regret(uint8_t tier) const override { return model_.regret(tier); }

  Use restored(uint32_t stamp) const override { return {stamp, Mark{}.packed()}; }

  void touched(const BlockKey& key, Use& use, uint32_t stamp) override {
    Mark mark = Mark::of(use);
    mark.uses = std::min(mark.uses + 1, kUsesMax);
    mark.fresh = false;
    use = {stamp, mark.packed()};
    if (model_.watches(key)) model_.use(key, stamp, mark.uses, mark.group());
    now_ = std::max(now_, stamp);
  }

  Queued queued(const Use& use) const override { return {Mark::of(use).group(), use.stamp}; }

  uint32_t queues() const override { return ReuseModel::kClasses; }

  std::optional<EvictionOrder::Entry> choose(PoolId, const EvictionOrder& order) override {
    model_.catch_up();
    Oldest oldest;
    for (uint32_t group = 0; group < oldest.size(); ++group) oldest[group] = order.oldest(group);
    if (!model_.saw_returns()) return least_recently_used(oldest);
    if (model_.lessons() != sorted_at_) sort_cells();
    for (const Cell& cell : cells_) {
      if (!oldest[cell.group]) continue;
      const uint32_t age = now_ - std::min(now_, oldest[cell.group]->stamp());
      if (age < cell.from) continue;
      if (age <= cell.to) return oldest[cell.group];
      const auto entry = order.oldest(cell.group, now_ - std::min(now_, cell.to));
      if (entry && entry->stamp() <= now_ - std::min(now_, cell.from)) return entry;
    }
    return order.first();
  }

  void resize(PoolId pool, uint32_t pages) override {
    if (pool >= pages_.size()) pages_.resize(pool + 1, 0);
    pages_[pool] = pages;
    const uint32_t largest = std::ranges::max(pages_);
    if (largest != watched_) model_.resize(largest);
    watched_ = largest;
  }

  void halved() override {
    model_.forget();
    now_ /= 2;
  }

  size_t metadata_bytes() const override {
    return model_.metadata_bytes() + cells_.capacity() * sizeof(Cell);
  }

 private:
  // Of a block that nobody remembers. Its request has used the parent too; the uses of others
  // count.
  static Mark hung_on(const Use* parent, uint32_t stamp) {
    const uint32_t uses = parent ? Mark::of(*parent).uses : 0;
    const uint32_t before = parent && parent->stamp >= stamp ? uses - 1 : uses;
    return {.uses = 1,
            .hung_on = std::min<uint32_t>(std::bit_width(before), kHungOn - 1),
            .fresh = true};
  }

  using Oldest = std::array<std::optional<EvictionOrder::Entry>, ReuseModel::kClasses>;

  static std::optional<EvictionOrder::Entry> least_recently_used(const Oldest& oldest) {
    std::optional<EvictionOrder::Entry> found;
    for (const auto& each : oldest) {
      if (each && (!found || each->stamp() < found->stamp())) found = each;
    }
    return found;
  }

  struct Cell {
    float worth;
    uint32_t group, from, to;  // ages
  };

  // An octave's cells lie between its worth and that of the next one. Octave 0 is ages 0 and 1: 0
  // is what the latest request used and has released already.
  void sort_cells() {
    cells_.clear();
    for (uint32_t group = 0; group < ReuseModel::kClasses; ++group) {
      cells_.push_back({model_.worth(group, 0), group, 0, 1});
      for (uint32_t octave = 1; octave < ReuseModel::kAges; ++octave) {
        const float here = model_.worth(group, octave);
        const float next = model_.worth(group, std::min(octave + 1, ReuseModel::kAges - 1));
        const uint32_t parts = std::min(kCells, 1U << octave);
        const uint32_t width = (1U << octave) / parts;
        for (uint32_t part = 0; part < parts; ++part) {
          const uint32_t from = (1U << octave) + part * width;
          const float along = (static_cast<float>(part) + 0.5F) / static_cast<float>(parts);
          cells_.push_back({here + (next - here) * along, group, from, from + (width - 1)});
        }
      }
    }
    std::ranges::stable_sort(cells_, [](const Cell& a, const Cell& b) {
      return a.worth != b.worth ? a.worth < b.worth : a.from > b.from;
    });
    sorted_at_ = model_.lessons();
  }

  ReuseModel model_;
  std::vector<Cell> cells_;      // worth least first
  uint64_t sorted_at_ = 0;       // the lesson that cells_ follow
  std::vector<uint32_t> pages_;  // by pool
  uint32_t watched_ = 0;         // pages that the model's watch was made for
  uint32_t now_ = 0;             // the latest acquire that used a block
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_hazard(uint64_t seed) {
  return std::make_unique<Hazard>(seed);
}

}  // namespace kvc2
