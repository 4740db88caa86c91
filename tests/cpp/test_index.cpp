// What Python cannot reach in csrc/index: the parts below the facade.
#include <atomic>
#include <cstdio>
#include <thread>

#include "base/check.h"
#include "index/index.h"

using namespace kvc2;

// A split keeps the tail's node and moves the head's pages to a new one.
static void a_split_moves_the_owners_before_the_branch() {
  Pools pools;
  pools.add(PagePool::Shape{1, 8, std::nullopt, false});
  pools[0].add_slab();
  const auto policy = make_policy("lru", 0);
  RadixTree tree(pools, *policy);
  const uint32_t space = tree.add_space(Digest{}, 1);
  const std::vector<uint32_t> path{1, 2, 3, 4};
  Place at{tree.spaces[space].root, kBeforeFirst};
  std::vector<PageId> pages;
  for (size_t i = 0; i < path.size(); ++i) {
    at = *tree.insert(at, Tokens(path).subspan(i, 1), 1);
    pages.push_back(*pools[0].allocate(PageState::kPrivate));
    pools[0].move(pages.back(), PageState::kResident);
    tree.place(at, 0, pages.back());
    tree.refresh(at.node);
  }
  const NodeId tail = at.node;
  const std::vector<uint32_t> branch{9};
  const Place joined = *tree.insert(tree.owner(0, pages[1]), Tokens(branch), 2);
  pages.push_back(*pools[0].allocate(PageState::kPrivate));
  pools[0].move(pages.back(), PageState::kResident);
  tree.place(joined, 0, pages.back());
  tree.refresh(joined.node);
  tree.check();
  KVC2_CHECK(tree.owner(0, pages[3]).node == tail && tree.owner(0, pages[3]).offset == 1, "tail");
  KVC2_CHECK(tree.owner(0, pages[0]).node == tree[tail].parent, "head");
  KVC2_CHECK(tree.live_nodes == 4 && tree.blocks == 5, "%u nodes", tree.live_nodes);
}

// I5: pages come from the lowest slab, and a slab goes only when it is free.
static void a_slab_goes_only_when_all_its_pages_are_free() {
  PagePool pool(PagePool::Shape{1, 2, std::nullopt, false});
  pool.add_slab();
  pool.add_slab();
  KVC2_CHECK(*pool.allocate(PageState::kPrivate) == 0, "lowest first");
  pool.take(3, PageState::kPrivate);
  KVC2_CHECK(!pool.take_slab(0) && !pool.take_slab(1), "private pages");
  pool.free(0);
  KVC2_CHECK(pool.take_slab(0) && !pool.take_slab(0), "free");
  pool.check(0);
  KVC2_CHECK(*pool.allocate(PageState::kPrivate) == 2 && !pool.allocate(PageState::kPrivate),
             "full");
  KVC2_CHECK(pool.add_slab() == 0, "the lowest number again");
  pool.check(0);
}

// One thread serves requests, as the daemon's loop does, while another completes transfers, as its
// movers do. For ThreadSanitizer above all; check() proves what came of it.
static void one_thread_matches_while_another_completes_transfers() {
  Index index(1, 1);
  const PoolId disk = index.add_pool({1, 16, std::nullopt, true});
  const PoolId cpu = index.add_pool({1, 8, disk, false});
  const PoolId gpu = index.add_pool({1, 8, cpu, false});
  for (const PoolId pool : {disk, cpu, gpu}) index.add_slab(pool);
  const uint32_t space = index.open_namespace(Digest{}, 1);
  std::atomic<bool> done = false;
  std::atomic<uint32_t> moved = 0;
  std::thread mover([&] {
    for (uint32_t turn = 0; !done || turn < 100; ++turn) {
      for (const PoolId pool : {gpu, cpu}) {
        const auto plan = index.plan_demote(pool, 4);
        if (!plan) continue;
        const auto pages = static_cast<uint32_t>(plan->source_pages.size());
        index.complete(plan->id, turn % 3 == 0 ? pages / 2 : pages);
        moved += pages;
      }
      index.evict(disk, turn % 2);
    }
  });
  for (uint32_t turn = 0; turn < 2000 || moved == 0; ++turn) {
    const std::vector<uint32_t> path{turn % 3, turn % 5, turn % 7, turn % 2};
    const LeaseView lease = index.acquire(space, gpu, Tokens(path), 4);
    const Load load = index.next_load(lease.id, 2);
    if (const auto* plan = std::get_if<Transfer>(&load)) index.complete(plan->id, 1);
    if (const auto plan = index.promote(lease.id)) index.complete(plan->id, turn % 2);
    const auto held = static_cast<uint32_t>(index.lease(lease.id).pages.size());
    const std::vector<PageId> pages = index.grant(gpu, 4 - held);
    const Tokens computed = Tokens(path).subspan(held, pages.size());
    index.commit(lease.id, {computed, {}, held}, pages);
    KVC2_CHECK(index.match(space, gpu, Tokens(path)).blocks <= 4, "longer than the path");
    index.release(lease.id);
    index.give_back(gpu, pages);  // false where they have become blocks
    if (turn % 50 == 0) index.check();
  }
  done = true;
  mover.join();
  index.check();
  KVC2_CHECK(index.counts().leases == 0, "%u pages moved", moved.load());
}

int main() {
  a_split_moves_the_owners_before_the_branch();
  a_slab_goes_only_when_all_its_pages_are_free();
  one_thread_matches_while_another_completes_transfers();
  std::puts("ok");
}
