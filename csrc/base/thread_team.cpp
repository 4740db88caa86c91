#include "base/thread_team.h"

#include <algorithm>

#include "base/check.h"

namespace kvc2 {

ThreadTeam::ThreadTeam(size_t threads) {
  KVC2_CHECK(threads >= 1, "a team of %zu threads", threads);
  others_.reserve(threads - 1);
  for (size_t i = 1; i < threads; ++i) others_.emplace_back([this, i] { serve(i); });
}

ThreadTeam::~ThreadTeam() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& other : others_) other.join();
}

void ThreadTeam::run(const Work& work) {
  const std::lock_guard call(calls_);
  next_.store(0, std::memory_order_relaxed);
  if (others_.empty() || work.items <= work.grain) {  // waking somebody costs more than one piece
    take_pieces(work, 0);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    work_ = work;
    open_ = true;
    ++call_;
  }
  wake_.notify_all();
  take_pieces(work, 0);
  std::unique_lock lock(mutex_);
  open_ = false;
  idle_.wait(lock, [this] { return busy_ == 0; });
}

void ThreadTeam::take_pieces(const Work& work, size_t thread) {
  for (;;) {
    const size_t begin = next_.fetch_add(work.grain, std::memory_order_relaxed);
    if (begin >= work.items) return;
    work.call(work.context, begin, std::min(begin + work.grain, work.items), thread);
  }
}

void ThreadTeam::serve(size_t thread) {
  uint64_t served = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || call_ != served; });
    if (stop_) return;
    served = call_;
    if (!open_) continue;
    ++busy_;
    const Work work = work_;
    lock.unlock();
    take_pieces(work, thread);
    lock.lock();
    if (--busy_ == 0) idle_.notify_one();
  }
}

}  // namespace kvc2
