// The pools of an index, by id. In one sentence: *a pool is known from `add` until it begins to
// leave, and its id is never used again.*
//
// A pool, from -> to [function]:
//   absent  -> open      [add]
//   open    -> closed    [Index::close_pool]   its session is over: nothing is planned into it
//   again closed  -> leaving   [Index::remove_pool]  `at` and `alive` know it no more; the tree
//   still does leaving -> absent    [remove]              no block has a page of it any more
//
// Each call is O(1), or O(pools of a chain). Not thread-safe: the index holds its lock.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "index/page_pool.h"

namespace kvc2 {

// A pool, namespace, lease or transfer that is not (or no longer) there.
struct UnknownId : std::out_of_range {
  using std::out_of_range::out_of_range;
};

class Pools {
 public:
  // A pool without slabs. Throws std::invalid_argument, or UnknownId for the pool below.
  PoolId add(const PagePool::Shape& shape);
  void remove(PoolId id) { pools_[id] = nullptr; }

  bool alive(PoolId id) const { return present(id) && !pools_[id]->leaving; }
  bool present(PoolId id) const { return id < pools_.size() && pools_[id]; }  // perhaps leaving
  PoolId size() const { return static_cast<PoolId>(pools_.size()); }          // ids in use so far

  // Throws UnknownId unless it is alive.
  PagePool& at(PoolId id) {
    check_alive(id);
    return *pools_[id];
  }
  const PagePool& at(PoolId id) const {
    check_alive(id);
    return *pools_[id];
  }
  PagePool& operator[](PoolId id) { return *pools_[id]; }  // one that is present
  const PagePool& operator[](PoolId id) const { return *pools_[id]; }

  std::vector<PoolId> chain(PoolId head) const;    // `head` and the pools below it, fastest first
  bool is_above(PoolId above, PoolId pool) const;  // `pool` is in the chain below `above`

 private:
  void check_alive(PoolId id) const {
    if (!alive(id)) [[unlikely]]
      throw UnknownId("pool " + std::to_string(id));
  }

  std::vector<std::unique_ptr<PagePool>> pools_;  // by id; null once removed
};

}  // namespace kvc2
