// What a kernel needs besides its operands: threads, and memory that is kept between calls, since
// fresh memory costs a page fault every 4 KiB.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

#include "base/check.h"
#include "base/thread_team.h"

namespace kvc2 {

// Grows and is reused. Aligned to cache lines; the content is undefined.
class Scratch {
 public:
  // At least `bytes`, valid until the next call.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(4096, size_));
      KVC2_CHECK(memory_ != nullptr, "no %zu bytes of scratch", size_);
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// Of one caller at a time.
struct Workspace {
  explicit Workspace(size_t threads) : team(threads) {}
  ThreadTeam team;
  Scratch scratch;
};

}  // namespace kvc2
