#include "index/eviction/reuse_model.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace kvc2 {

// The watch has three entries for two pages, what the bound on ghosts allows, and three blocks in
// sixteen are watched, so that it reaches back over eight times the blocks of a pool: those come
// back that a pool of a hundredth of the traffic forgot. A small pool is watched more densely,
// since it sees few blocks: for it 8 KiB are no cost.
constexpr size_t kReach = 8;
constexpr size_t kEntriesMin = 1024;
constexpr size_t kShareUnit = 256;
constexpr uint32_t kLearnEvery = 64;
// Lessons fade: about the last 8,000 watched uses count, and at least those that the watch holds.
constexpr double kMemoryUses = 8192;
constexpr double kPrior = 8;
// A pool of fewer pages holds so few paths at a time that one wrong victim costs a share of all
// hits, and what is learnt of classes is learnt of a handful of sessions. The priors are stronger
// by the square of what it is short of; the largest pool counts, since the model serves all.
constexpr double kFewPages = 512;
constexpr double kPriorHazard = 0.05;  // in every octave; only that it is flat matters
// What comes back is known by as many returns as the prior counts, and by eight times those that
// a watch full of tags of 16 bits takes for some.
constexpr double kReturnsMin = 8;
constexpr double kReturnsShare = 1.0 / 1024;

ReuseModel::ReuseModel(uint64_t seed) : seed_(seed), prior_(kPrior) { learn(); }

void ReuseModel::resize(size_t pages) {
  const size_t sets = std::max(pages + pages / 2, kEntriesMin) / kWays;
  const double short_of =
      std::max(1.0, kFewPages / static_cast<double>(std::max<size_t>(pages, 1)));
  prior_ = kPrior * short_of * short_of;
  watched_share_ = static_cast<uint32_t>(std::min<size_t>(
      sets * kWays * kShareUnit / (kReach * std::max<size_t>(pages, 1)), kShareUnit));
  sets_.assign(sets, Set{});
  seen_.assign(sets, 0);
  next_set_ = 0;
}

void ReuseModel::forget() {
  std::ranges::fill(sets_, Set{});
  std::ranges::fill(seen_, 0);
  now_ = 0;
}

uint64_t ReuseModel::hash(const BlockKey& key) const {
  uint64_t word = NameHash{}(key) ^ seed_;
  word ^= word >> 32;
  return word * 0x9E3779B97F4A7C15;
}

bool ReuseModel::watches(const BlockKey& key) const { return (hash(key) >> 56) < watched_share_; }

static uint16_t tag_of(uint64_t hash) { return static_cast<uint16_t>(hash >> 40); }

// The hash's lower half, scaled to the number of sets.
size_t ReuseModel::set_of(uint64_t hash) const { return (hash & 0xFFFFFFFF) * sets_.size() >> 32; }

const ReuseModel::Entry* ReuseModel::find(const BlockKey& key) const {
  const uint64_t at = hash(key);
  for (const Entry& entry : sets_[set_of(at)]) {
    if (entry.when != 0 && entry.tag == tag_of(at)) return &entry;
  }
  return nullptr;
}

void ReuseModel::fetch(const BlockKey& key) const {
  __builtin_prefetch(&sets_[set_of(hash(key))], 1);
}

ReuseModel::Known ReuseModel::known(const BlockKey& key) const {
  const Entry* entry = find(key);
  return entry ? Known{entry->when, entry->uses} : Known{};
}

void ReuseModel::refuse(const BlockKey& key, uint8_t tier) {
  tier = std::min<uint8_t>(tier, kTiers - 1);
  auto* known = const_cast<Entry*>(find(key));
  if (!known || (known->refused >> tier & 1) != 0) return;
  known->refused = known->refused | 1U << tier;
  ++regret_[tier].watched;
}

void ReuseModel::miss(const BlockKey& key, uint32_t now, uint32_t uses, uint32_t group) {
  const Entry* known = find(key);
  for (uint32_t tier = 0; known && tier < kTiers; ++tier) {
    regret_[tier].regretted += known->refused >> tier & 1;
  }
  use(key, now, uses, group);
}

static uint32_t octaves_reached(uint32_t age) { return static_cast<uint32_t>(std::bit_width(age)); }

// The octaves that a wait has come to since it was last looked at.
void ReuseModel::count_open(const Entry& entry, uint32_t seen) {
  const uint32_t from = entry.when < seen ? octaves_reached(seen - entry.when) : 0;
  for (uint32_t age = from; age < octaves_reached(now_ - entry.when); ++age) {
    ++reached_[entry.group][age];
  }
}

void ReuseModel::look_through(size_t set) {
  for (const Entry& entry : sets_[set]) {
    if (entry.when != 0) count_open(entry, seen_[set]);
  }
  seen_[set] = now_;
}

void ReuseModel::use(const BlockKey& key, uint32_t now, uint32_t uses, uint32_t group) {
  const uint64_t at = hash(key);
  const size_t set = set_of(at);
  now_ = std::max(now_, now);
  Entry* entry = std::ranges::find_if(
      sets_[set], [&](const Entry& each) { return each.when != 0 && each.tag == tag_of(at); });
  if (entry == sets_[set].end()) {
    entry = std::ranges::min_element(sets_[set], {}, &Entry::when);
    if (entry->when != 0) count_open(*entry, seen_[set]);
  } else if (entry->when < now_) {
    count_open(*entry, seen_[set]);
    ++ended_[entry->group][octaves_reached(now_ - entry->when) - 1];
  }
  *entry = {.when = now_,
            .tag = tag_of(at),
            .uses = static_cast<uint8_t>(uses),
            .group = static_cast<uint8_t>(group & 7)};
  look_through(next_set_);
  next_set_ = (next_set_ + 1) % sets_.size();
  if (++taught_ == kLearnEvery) fade();
}

using ByAge = std::array<double, ReuseModel::kAges>;

static bool comes_back(const ByAge& ended, const ByAge& reached) {
  const double returns = std::accumulate(ended.begin(), ended.end(), 0.0);
  return returns >= kReturnsMin + reached[0] * kReturnsShare;
}

// The hazards of waits and of `waits` more that ended as `prior` says. `falling`: no octave is
// taken to be likelier than the one before it until it shows that it is.
static ByAge hazards(const ByAge& ended, const ByAge& reached, const ByAge& prior, double waits,
                     bool falling) {
  ByAge found;
  for (size_t age = 0; age < found.size(); ++age) {
    const double before = falling && age > 0 ? found[age - 1] : 1;
    const double expected = std::min(prior[age], before);
    found[age] = std::min(1.0, (ended[age] + waits * expected) / (reached[age] + waits));
  }
  return found;
}

// What an octave adds to the time that a page is held.
constexpr auto kOctaves = [] {
  std::array<double, ReuseModel::kAges> lengths{};
  for (size_t age = 0; age < lengths.size(); ++age) lengths[age] = static_cast<double>(1ULL << age);
  return lengths;
}();

void ReuseModel::fade() {
  const double kept = 1 - taught_ / std::max(kMemoryUses, 1.0 * kWays * sets_.size());
  for (uint32_t group = 0; group < kClasses; ++group) {
    for (uint32_t age = 0; age < kAges; ++age) {
      ended_[group][age] *= kept;
      reached_[group][age] *= kept;
    }
  }
  taught_ = 0;
  due_ = true;
}

void ReuseModel::learn() {
  ByAge ended{}, reached{}, flat;
  flat.fill(kPriorHazard);
  for (uint32_t group = 0; group < kClasses; ++group) {
    for (uint32_t age = 0; age < kAges; ++age) {
      ended[age] += ended_[group][age];
      reached[age] += reached_[group][age];
    }
  }
  saw_returns_ = comes_back(ended, reached);
  const ByAge of_all = hazards(ended, reached, flat, prior_, true);
  for (uint32_t group = 0; group < kClasses; ++group) {
    const bool falling = !comes_back(ended_[group], reached_[group]);
    const ByAge hazard = hazards(ended_[group], reached_[group], of_all, prior_, falling);
    for (uint32_t age = 0; age < kAges; ++age) {
      double waiting = 1, used = 0, held = 0, best = 0;
      for (uint32_t horizon = age; horizon < kAges; ++horizon) {
        used += waiting * hazard[horizon];
        held += waiting * ((1 - hazard[horizon] / 2) * kOctaves[horizon]);
        waiting *= 1 - hazard[horizon];
        best = std::max(best, used / held);
      }
      worth_[group][age] = static_cast<float>(best);
    }
  }
  due_ = false;
  ++lessons_;
}

size_t ReuseModel::metadata_bytes() const {
  return sets_.capacity() * sizeof(Set) + seen_.capacity() * sizeof(uint32_t) + sizeof *this;
}

}  // namespace kvc2
