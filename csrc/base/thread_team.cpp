#include "base/thread_team.h"

#include <immintrin.h>

#include <algorithm>

#include "base/check.h"

namespace kvc2 {
namespace {

constexpr int kLooks = 1500;  // some 30 us of waiting on Zen 4, twice that on Skylake

// Looks for `come` for a while, without sleeping. False: it didn't come.
template <class Come>
bool linger(bool lingers, const Come& come) {
  for (int i = 0; lingers && i < kLooks; ++i) {
    if (come()) return true;
    _mm_pause();
  }
  return come();
}

}  // namespace

ThreadTeam::ThreadTeam(size_t threads, Between between) : lingers_(between == Between::kLinger) {
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
  bool wake = false;
  {
    const std::lock_guard lock(mutex_);
    work_ = work;
    open_ = true;
    call_.fetch_add(1, std::memory_order_release);
    wake = asleep_ > 0;
  }
  if (wake) wake_.notify_all();
  take_pieces(work, 0);
  {
    const std::lock_guard lock(mutex_);
    open_ = false;
  }
  const auto done = [this] { return busy_.load(std::memory_order_acquire) == 0; };
  if (linger(lingers_, done)) return;
  std::unique_lock lock(mutex_);
  idle_.wait(lock, done);
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
  const auto called = [&] { return stop_ || call_.load(std::memory_order_acquire) != served; };
  std::unique_lock lock(mutex_);
  for (;;) {
    if (!called()) {
      lock.unlock();
      const bool come = linger(lingers_, called);
      lock.lock();
      if (!come) {
        ++asleep_;
        wake_.wait(lock, called);
        --asleep_;
      }
    }
    if (stop_) return;
    served = call_.load(std::memory_order_relaxed);
    if (!open_) continue;
    busy_.fetch_add(1, std::memory_order_relaxed);
    const Work work = work_;
    lock.unlock();
    take_pieces(work, thread);
    lock.lock();
    if (busy_.fetch_sub(1, std::memory_order_release) == 1) idle_.notify_one();
  }
}

}  // namespace kvc2
