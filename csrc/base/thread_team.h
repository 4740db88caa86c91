// A fixed team of threads that share the work of one call. The caller is one of them, so a team of
// one starts no thread. Between calls the others sleep on a condition variable, since others need
// the cores; a team that lingers looks for the next call some tens of microseconds before, for
// calls in quick succession, which waking would cost as much as their work. Not a queue: a call
// returns when its work is done.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace kvc2 {

class ThreadTeam {
 public:
  enum class Between { kSleep, kLinger };

  explicit ThreadTeam(size_t threads,  // the caller included; at least 1
                      Between between = Between::kSleep);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  size_t threads() const { return others_.size() + 1; }

  // Calls body(begin, end) for pieces of at most `grain` that cover [0, items) once; or body(begin,
  // end, thread), the thread under threads() and the caller's 0, for one with memory for each.
  // Pieces are handed out in rising order, to whoever is free: items may differ in cost. All
  // effects of the pieces are visible to the caller afterwards. Calls from several threads run one
  // by one. `body` must not throw, and must not call the same team.
  template <class Body>
  void parallel_for(size_t items, size_t grain, const Body& body) {
    const Work work{[](const void* context, size_t begin, size_t end, size_t thread) {
                      const Body& known = *static_cast<const Body*>(context);
                      if constexpr (std::is_invocable_v<const Body&, size_t, size_t, size_t>) {
                        known(begin, end, thread);
                      } else {
                        known(begin, end);
                      }
                    },
                    &body, items, grain == 0 ? 1 : grain};
    run(work);
  }

 private:
  struct Work {
    void (*call)(const void* context, size_t begin, size_t end, size_t thread);
    const void* context;
    size_t items, grain;
  };

  void run(const Work& work);
  void take_pieces(const Work& work, size_t thread);
  void serve(size_t thread);

  const bool lingers_;
  std::mutex calls_;  // held for a whole call
  std::mutex mutex_;  // guards what follows, up to asleep_
  std::condition_variable wake_, idle_;
  Work work_{};
  bool open_ = false;  // whether there is work left to join; who wakes later isn't waited for
  size_t asleep_ = 0;  // of the others: without one, nobody need be woken
  // Changed under the lock, and looked at without it:
  std::atomic<uint64_t> call_{0};  // rises by one with each call that is for the others
  std::atomic<size_t> busy_{0};    // of the others, in this call
  std::atomic<bool> stop_{false};
  std::atomic<size_t> next_{0};  // first item that nobody has taken
  std::vector<std::thread> others_;
};

}  // namespace kvc2
