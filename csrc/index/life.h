// What requests said of a block, beyond that they used it. The order of eviction reads it.
//
// Each request says a Life for the whole prefix that it uses, and `merged` combines that with what
// earlier requests said. So a block expires no earlier than the blocks below it (I9), and the
// expired blocks of a path are its tail.
// Times are seconds of the caller's clock, as Index::advance was told them; 0 is no time.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvc2 {

constexpr uint8_t kPriorityMax = 7;
// A request counts as on its way for this many times the wait that it announced: a request that is
// a little late is as likely to come as before, and giving up on it costs its whole path.
constexpr uint32_t kReturnSlack = 4;

struct Life {
  uint32_t expires = 0;  // from this second on the block is dead (I8); 0: never
  uint32_t returns = 0;  // until this second a request that used it may be on its way back; 0: none
  uint8_t priority = 0;  // the highest that a request gave it, at most kPriorityMax
  bool ended = false;    // the last request that used it said that its session is over

  bool operator==(const Life&) const = default;
  bool expired(uint32_t now) const { return expires != 0 && expires <= now; }
};

// The second that is so much later; 0 where nothing is said.
inline uint32_t seconds_later(uint32_t now, uint32_t seconds) {
  return seconds == 0 ? 0 : now + std::min(seconds, ~now);
}

// What a request says; 0 and false say nothing.
struct Hints {
  uint32_t ttl = 0;             // seconds after its last use that what it uses may be matched
  uint32_t returns_within = 0;  // seconds until it, or one that goes on from it, is expected
  uint8_t priority = 0;         // at most kPriorityMax
  bool session_end = false;     // nobody goes on from it

  bool operator==(const Hints&) const = default;
  Life life(uint32_t now) const {
    const uint32_t patience = std::min(returns_within, ~0U / kReturnSlack) * kReturnSlack;
    return {.expires = seconds_later(now, ttl),
            .returns = seconds_later(now, patience),
            .priority = priority};
  }
};

// Consecutive blocks of a node that live alike: those before `end` and after the run before.
struct LifeRun {
  uint32_t end;
  Life life;
};

// A block is used again: the later expiry and the higher priority hold; for the rest, what is said.
inline Life merged(const Life& known, const Life& said) {
  const bool for_ever = known.expires == 0 || said.expires == 0;
  return {.expires = for_ever ? 0 : std::max(known.expires, said.expires),
          .returns = said.returns,
          .priority = std::max(known.priority, said.priority),
          .ended = said.ended};
}

// Which blocks are evicted before which others under every policy: the lowest standing goes first.
// Within a standing the policy decides.
enum Standing : uint8_t {
  kDead = 0,   // expired, or its namespace is retired
  kEnded = 1,  // of a session that is over
  kPlain = 2,  // two for each priority: blocks that no request is awaited for, then the others
  kSoftPinned = kPlain + 2 * (kPriorityMax + 1),
};

inline uint8_t standing(const Life& life, bool soft_pinned, uint32_t now) {
  if (life.expired(now)) return kDead;
  if (soft_pinned) return kSoftPinned;
  if (life.ended && life.priority == 0) return kEnded;
  const bool awaited = life.returns > now;
  return static_cast<uint8_t>(kPlain + 2 * life.priority + awaited);
}

}  // namespace kvc2
