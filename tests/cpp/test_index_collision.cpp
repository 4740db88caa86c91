// What the index does when two blocks have one key. No test can wait for that, so this program has
// a weak xxh3_128 of its own, which the linker takes before the library's: the sum of the words.
// With 2 tokens a block, (1, 2) and (2, 1) after the same block are a collision.
#include <cstdio>
#include <cstring>

#include "base/xxh3.h"
#include "expect.h"
#include "index/index.h"

namespace kvc2 {

std::array<uint8_t, 16> xxh3_128(const void* data, size_t bytes) {
  std::array<uint8_t, 16> key{};
  for (size_t i = 0; i + 4 <= bytes; i += 4) {
    uint32_t sum, word;
    std::memcpy(&sum, key.data(), 4);
    std::memcpy(&word, static_cast<const uint8_t*>(data) + i, 4);
    sum += word;
    std::memcpy(key.data(), &sum, 4);
  }
  return key;
}

}  // namespace kvc2

using namespace kvc2;
using Path = std::vector<uint32_t>;

static constexpr auto kAdopted = CommitResult::kAdopted, kRefused = CommitResult::kRefused;

struct House {
  Index index{1, 1};
  PoolId pool = index.add_pool({2, 8, std::nullopt, false});
  uint32_t space = index.open_namespace(Digest{}, 2);

  House() { index.add_slab(pool); }

  // What the last block's commit answered.
  CommitResult compute(const Path& path) {
    const LeaseView lease = index.acquire(space, pool, Tokens(path), 9);
    const size_t held = lease.pages.size();
    const auto pages = index.grant(pool, static_cast<uint32_t>(path.size() / 2 - held));
    const auto results = index.commit(lease.id, Content(Tokens(path)).after(held, 2), pages);
    index.release(lease.id);
    index.check();
    return results.back();
  }

  uint32_t matched(const Path& path) const { return index.match(space, pool, Tokens(path)).blocks; }
};

static void the_second_first_block_with_a_key_is_refused_and_counted() {
  House house;
  EXPECT(house.compute({1, 2}) == kAdopted);
  EXPECT(house.compute({2, 1}) == kRefused);
  EXPECT(house.index.counts().collisions == 1);
  EXPECT(house.matched({1, 2}) == 1 && house.matched({2, 1}) == 0);
}

static void so_is_one_beside_a_block_within_a_run() {
  House house;
  EXPECT(house.compute({0, 0, 1, 2}) == kAdopted);
  EXPECT(house.compute({0, 0, 2, 1}) == kRefused);
  EXPECT(house.index.counts().collisions == 1);
  EXPECT(house.matched({0, 0, 1, 2}) == 2 && house.matched({0, 0, 2, 1}) == 1);
}

static void so_is_one_under_another_path() {
  House house;
  EXPECT(house.compute({1, 1, 5, 5}) == kAdopted);
  EXPECT(house.compute({1, 1, 3, 3}) == kAdopted);  // [1 1] ┬─ [5 5], [3 3]: keys 12 and 8
  EXPECT(house.compute({0, 1}) == kAdopted);
  EXPECT(house.compute({3, 5}) == kRefused);  // 8
  EXPECT(house.matched({1, 1, 3, 3}) == 2);
}

// A run's inner keys are in no table until a split makes one of them a node's first.
static void a_branch_whose_split_would_take_another_node_s_key_is_refused() {
  House house;
  EXPECT(house.compute({1, 1, 2, 2}) == kAdopted);  // keys 2, 6
  EXPECT(house.compute({2, 2, 1, 1}) == kAdopted);  // keys 4, 6
  EXPECT(house.compute({1, 1, 9, 9}) == kAdopted);  // 6 is a node's first key now
  EXPECT(house.compute({2, 2, 7, 7}) == kRefused);
  EXPECT(house.index.counts().collisions == 1);
  EXPECT(house.matched({1, 1, 2, 2}) == 2 && house.matched({2, 2, 1, 1}) == 2);
}

static void a_record_with_another_s_key_is_a_conflict() {
  Index index(1, 1);
  const PoolId disk = index.add_pool({2, 8, std::nullopt, true});
  index.add_slab(disk);
  index.open_namespace(Digest{}, 2);
  const Path tokens{1, 2, 2, 1};
  const std::vector<Digest> parents(2);
  const std::vector<Digest> digests{next_digest(parents[0], Tokens(tokens).first(2)),
                                    next_digest(parents[1], Tokens(tokens).last(2))};
  const std::vector<PageId> pages{0, 1};
  const std::vector<uint64_t> generations{1, 2};
  const std::vector<uint32_t> stamps{1, 1};
  const auto results = index.restore(disk, {digests, parents, tokens, pages, generations, stamps});
  index.check();
  EXPECT(results[0] == RestoreResult::kRestored && results[1] == RestoreResult::kConflict);
  EXPECT(index.counts().collisions == 1);
}

static void a_namespace_with_another_s_root_key_is_refused() {
  House house;
  Digest one{}, other{};
  one[0] = 1;
  other[4] = 1;
  house.index.open_namespace(one, 2);
  bool refused = false;
  try {
    house.index.open_namespace(other, 2);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  EXPECT(refused);
}

int main() {
  the_second_first_block_with_a_key_is_refused_and_counted();
  so_is_one_beside_a_block_within_a_run();
  so_is_one_under_another_path();
  a_branch_whose_split_would_take_another_node_s_key_is_refused();
  a_record_with_another_s_key_is_a_conflict();
  a_namespace_with_another_s_root_key_is_refused();
  std::puts(failures ? "failed" : "ok");
  return failures ? 1 : 0;
}
