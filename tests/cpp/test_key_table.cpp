// The key table beside std::unordered_map, with keys that crowd: grown, shrunk, and run over by
// removals in every order.
#include <cstdint>
#include <unordered_map>

#include "expect.h"
#include "index/key_table.h"

using namespace kvc2;

namespace {

uint64_t next(uint64_t& state) {  // xorshift64, Marsaglia 2003
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

// Of `homes` places in each of two shards.
BlockKey key_of(uint64_t number, uint64_t homes) {
  BlockKey key{};
  const uint64_t home = number % homes;
  std::memcpy(key.data(), &home, sizeof home);
  key[9] = static_cast<uint8_t>(number), key[10] = static_cast<uint8_t>(number >> 8);
  key.back() = static_cast<uint8_t>(number % 2);
  return key;
}

void a_key_has_the_number_last_put(uint64_t homes, uint64_t keys) {
  uint64_t state = 88172645463325252 + homes;
  KeyTable table;
  std::unordered_map<uint64_t, uint32_t> expected;
  for (uint32_t step = 0; step < 40'000; ++step) {
    // it fills, then empties, three times over
    const bool filling = step / 5'000 % 2 == 0;
    const uint64_t number = next(state) % keys;
    const BlockKey key = key_of(number, homes);
    if (next(state) % 4 < (filling ? 3 : 1)) {
      table.put(key, step);
      expected[number] = step;
    } else {
      table.erase(key);
      expected.erase(number);
    }
    EXPECT(table.size() == expected.size());
    if (step % 500 != 499) continue;
    table.check();
    for (uint64_t each = 0; each < keys; ++each) {
      const auto found = expected.find(each);
      EXPECT(table.get(key_of(each, homes)) ==
             (found == expected.end() ? KeyTable::kAbsent : found->second));
    }
  }
}

void an_empty_table_is_small_again() {
  KeyTable table;
  for (uint64_t number = 0; number < 1'000; ++number) table.put(key_of(number, 1'000), 1);
  const size_t full = table.metadata_bytes();
  for (uint64_t number = 0; number < 1'000; ++number) table.erase(key_of(number, 1'000));
  EXPECT(table.size() == 0 && table.metadata_bytes() < full / 20);
}

}  // namespace

int main() {
  a_key_has_the_number_last_put(3, 40);        // long runs
  a_key_has_the_number_last_put(1 << 20, 60);  // runs over the end of a shard
  a_key_has_the_number_last_put(500, 1'000);
  an_empty_table_is_small_again();
  return failures;
}
