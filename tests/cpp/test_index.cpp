// What Python cannot reach in csrc/index: the parts below the facade.
#include <cstdio>

#include "base/check.h"
#include "index/index.h"

using namespace kvc2;

// A split keeps the tail's node and moves the head's pages to a new one.
static void a_split_moves_the_owners_before_the_branch() {
  Pools pools;
  pools.push_back(std::make_unique<PagePool>(PagePool::Shape{1, 8, std::nullopt, false}));
  pools[0]->add_slab();
  RadixTree tree(pools);
  const uint32_t space = tree.add_space(Digest{}, 1);
  const std::vector<uint32_t> path{1, 2, 3, 4};
  Place at{tree.spaces[space].root, kBeforeFirst};
  std::vector<PageId> pages;
  for (size_t i = 0; i < path.size(); ++i) {
    at = *tree.insert(at, Tokens(path).subspan(i, 1), 1);
    pages.push_back(*pools[0]->allocate(PageState::kPrivate));
    pools[0]->move(pages.back(), PageState::kResident);
    tree.place(at, 0, pages.back());
    tree.refresh(at.node);
  }
  const NodeId tail = at.node;
  const std::vector<uint32_t> branch{9};
  const Place joined = *tree.insert(tree.owner(0, pages[1]), branch, 2);
  pages.push_back(*pools[0]->allocate(PageState::kPrivate));
  pools[0]->move(pages.back(), PageState::kResident);
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

int main() {
  a_split_moves_the_owners_before_the_branch();
  a_slab_goes_only_when_all_its_pages_are_free();
  std::puts("ok");
}
