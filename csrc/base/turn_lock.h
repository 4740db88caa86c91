// A mutex that threads get in the order in which they asked for it.
//
// Why not std::mutex: a thread that gives it back and asks again overtakes the one that has waited
// for it all the time, so that a long call cut into slices would still be one long wait. Here the
// wait is what those before hold it, once each. Costs an atomic add to take and one to give back;
// who waits, sleeps.
#pragma once

#include <atomic>
#include <cstdint>

namespace kvc2 {

class TurnLock {
 public:
  void lock() {
    const uint32_t turn = next_.fetch_add(1, std::memory_order_relaxed);
    for (uint32_t now; (now = serving_.load(std::memory_order_acquire)) != turn;) {
      serving_.wait(now, std::memory_order_acquire);
    }
  }

  void unlock() {
    serving_.fetch_add(1, std::memory_order_release);
    serving_.notify_all();
  }

  // How many threads have asked and not got it; of use to the one that holds it.
  uint32_t waiting() const {
    return next_.load(std::memory_order_relaxed) - serving_.load(std::memory_order_relaxed) - 1;
  }

 private:
  std::atomic<uint32_t> next_{0}, serving_{0};
};

}  // namespace kvc2
