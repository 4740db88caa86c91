// What a kernel needs besides its operands: threads, and memory that is kept between calls, since
// fresh memory costs a page fault every 4 KiB.
#pragma once

#include <cstddef>
#include <memory>

#include "base/thread_team.h"

namespace kvc2 {

// Grows and is reused. Aligned to cache lines; the content is undefined.
class Scratch {
 public:
  // At least `bytes`, valid until the next call.
  void* reserve(size_t bytes);

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// Of one caller at a time.
struct Workspace {
  explicit Workspace(size_t threads) : team(threads, ThreadTeam::Between::kLinger) {}
  ThreadTeam team;
  Scratch scratch;
};

}  // namespace kvc2
