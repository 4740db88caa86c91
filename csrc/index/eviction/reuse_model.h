// How likely a block is to be used again, and how soon: learnt from the stream of requests alone,
// whatever the pools hold, so that what a policy evicts can't blind it.
//
// Three blocks in sixteen are watched, chosen by their keys. The watch remembers the last use of
// those blocks, evicted or not: a block that comes back ends a wait; the others' waits are still
// open. Both teach, by class of block and by octave of the wait (its log2, in acquires):
//
//     hazard(class, age) = waits that ended at this age / waits that came to be this old
//
// (Kaplan-Meier's estimate.) What a page is worth is the best rate of hits for its memory that
// holding it can still reach, over all horizons (the Gittins index of a wait):
//
//     worth(class, age) = max over T of  P(used within T) / E[time until it is used, or T]
//
// Where the hazard is the same in every octave and class, this is LRU. So it is where evidence is
// missing: kPrior waits of such a hazard (more where the pools are tiny) are added to the waits of
// all classes, and as many waits of all classes to those of each class. Of a class from which no
// block came back, only young ages are known; older ages are taken to be no likelier, or old blocks
// would be kept for a reason that nobody has seen.
//
// Costs: 12.75 bytes a page of the largest pool. A watched use reads one set of it, 64 bytes, and
// looks through another one. What the waits taught is worked out when it is asked for, at most once
// in kLearnEvery of them: so a request never waits for that, who needs a page does. Deterministic
// under its seed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "index/eviction/policy.h"

namespace kvc2 {

class ReuseModel {
 public:
  static constexpr uint32_t kClasses = 8;
  static constexpr uint32_t kAges = 32;  // octaves

  explicit ReuseModel(uint64_t seed);

  void resize(size_t pages);  // for pools of that many; the watch starts anew
  void forget();              // the clock was set back: waits that are open are dropped

  bool watches(const BlockKey& key) const;
  void fetch(const BlockKey& key) const;  // a watched block is about to be looked up
  struct Known {                          // of a watched block's last use, as far as is remembered
    uint32_t when = 0, uses = 0;
  };
  Known known(const BlockKey& key) const;
  // A watched block is used, and waits from then on as one of `group`. A `now` before the latest
  // `now` counts as the latest.
  void use(const BlockKey& key, uint32_t now, uint32_t uses, uint32_t group);
  // The same, where the block was not found; if it was refused before, that is regretted.
  void miss(const BlockKey& key, uint32_t now, uint32_t uses, uint32_t group);
  void refuse(const BlockKey& key, uint8_t tier);  // a watched block
  Regret regret(uint8_t tier) const { return regret_[std::min<size_t>(tier, kTiers - 1)]; }

  // To be called before worth is asked for: what was seen since the last lesson is learnt.
  void catch_up() {
    if (due_) learn();
  }
  float worth(uint32_t group, uint32_t octave) const { return worth_[group][octave]; }
  bool saw_returns() const { return saw_returns_; }  // until then worth() means nothing
  uint64_t lessons() const { return lessons_; }      // worth() changes only when this does
  size_t metadata_bytes() const;

 private:
  static constexpr uint32_t kWays = 8;
  static constexpr size_t kTiers = 5;

  struct Entry {  // the last use of one block; `when` is 0 where there is none
    uint32_t when = 0;
    uint16_t tag = 0;
    uint8_t uses = 0;
    uint8_t group : 3 = 0;
    uint8_t refused : 5 = 0;  // by which tiers, since it was used last
  };
  using Set = std::array<Entry, kWays>;
  template <typename T>
  using Table = std::array<std::array<T, kAges>, kClasses>;

  uint64_t hash(const BlockKey& key) const;
  size_t set_of(uint64_t hash) const;
  const Entry* find(const BlockKey& key) const;
  void count_open(const Entry& entry, uint32_t seen);
  void look_through(size_t set);
  void fade();
  void learn();

  uint64_t seed_;
  double prior_;  // waits
  std::vector<Set> sets_;
  std::vector<uint32_t> seen_;  // by set: up to when its open waits were counted
  uint32_t watched_share_ = 0;  // of blocks, in 256ths
  size_t next_set_ = 0;         // to be looked through
  uint32_t now_ = 0;            // the latest use
  uint32_t taught_ = 0;         // watched uses since what was seen has faded
  bool due_ = false;            // it has since the last lesson
  bool saw_returns_ = false;
  uint64_t lessons_ = 0;
  Table<double> reached_{}, ended_{};  // waits, by the octave that they came to or ended in
  Table<float> worth_{};
  std::array<Regret, kTiers> regret_{};
};

}  // namespace kvc2
