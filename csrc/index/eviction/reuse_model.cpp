#include "index/eviction/reuse_model.h"

#include <algorithm>
#include <bit>
#include <cmath>

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

uint32_t ReuseModel::uses(const BlockKey& key) const {
  const uint64_t at = hash(key);
  for (const Entry& entry : sets_[set_of(at)]) {
    if (entry.when != 0 && entry.tag == tag_of(at)) return entry.uses;
  }
  return 0;
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
            .group = static_cast<uint8_t>(group)};
  look_through(next_set_);
  next_set_ = (next_set_ + 1) % sets_.size();
  if (++taught_ == kLearnEvery) learn();
}

static double blend(double ended, double reached, double hazard, double waits) {
  return std::min(1.0, (ended + waits * hazard) / (reached + waits));
}

void ReuseModel::learn() {
  const double kept = 1 - taught_ / std::max(kMemoryUses, 1.0 * kWays * sets_.size());
  std::array<double, kAges> hazard_of_all;
  for (uint32_t age = 0; age < kAges; ++age) {
    double ended = 0, reached = 0;
    for (uint32_t group = 0; group < kClasses; ++group) {
      ended += ended_[group][age] *= kept;
      reached += reached_[group][age] *= kept;
    }
    hazard_of_all[age] = blend(ended, reached, kPriorHazard, prior_);
  }
  for (uint32_t group = 0; group < kClasses; ++group) {
    for (uint32_t age = 0; age < kAges; ++age) {
      double waiting = 1, used = 0, held = 0, best = 0;
      for (uint32_t horizon = age; horizon < kAges; ++horizon) {
        const double hazard =
            blend(ended_[group][horizon], reached_[group][horizon], hazard_of_all[horizon], prior_);
        used += waiting * hazard;
        held += waiting * std::ldexp(1 - hazard / 2, static_cast<int>(horizon));
        waiting *= 1 - hazard;
        best = std::max(best, used / held);
      }
      worth_[group][age] = static_cast<float>(best);
    }
  }
  taught_ = 0;
  ++lessons_;
}

size_t ReuseModel::metadata_bytes() const {
  return sets_.capacity() * sizeof(Set) + seen_.capacity() * sizeof(uint32_t) + sizeof *this;
}

}  // namespace kvc2
