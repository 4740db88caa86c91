// Hashes against vectors of their specifications and, at every length, every instruction set
// against the portable code; the thread team and the lock under contention.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "base/sha256.h"
#include "base/sha256_compress.h"
#include "base/thread_team.h"
#include "base/turn_lock.h"
#include "base/xxh3.h"
#include "base/xxh3_long.h"
#include "expect.h"

namespace {

using namespace kvc2;

template <size_t n>
std::string hex(const std::array<uint8_t, n>& bytes) {
  std::string text;
  for (const uint8_t byte : bytes) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", byte);
    text += digits;
  }
  return text;
}

std::span<const uint8_t> bytes_of(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

std::vector<uint8_t> noise(size_t bytes) {
  std::vector<uint8_t> data(bytes);
  uint64_t state = 88172645463325252;  // xorshift64, Marsaglia 2003
  for (uint8_t& byte : data) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    byte = static_cast<uint8_t>(state);
  }
  return data;
}

// FIPS 180-2, appendix B
void sha256_agrees_with_its_specification() {
  EXPECT(hex(sha256(bytes_of("abc"))) ==
         "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const std::string_view two_blocks = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
  const std::string_view digest =
      "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1";
  EXPECT(hex(sha256(bytes_of(two_blocks))) == digest);
  for (size_t cut = 0; cut <= two_blocks.size(); ++cut) {
    EXPECT(hex(sha256(bytes_of(two_blocks.substr(0, cut)), bytes_of(two_blocks.substr(cut)))) ==
           digest);
  }
  EXPECT(hex(sha256(bytes_of(std::string(1000000, 'a')))) ==
         "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

void every_sha256_compresses_alike() {
  if (!cpu().sha_ni) return;
  const std::vector<uint8_t> data = noise(64 * 9);
  for (size_t blocks = 0; blocks <= 9; ++blocks) {
    uint32_t portable[8] = {1, 2, 3, 4, 5, 6, 7, 8}, fast[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    sha::compress_portable(portable, data.data(), blocks);
    sha::compress_shani(fast, data.data(), blocks);
    EXPECT(std::equal(portable, portable + 8, fast));
  }
}

void every_xxh3_consumes_alike() {
  const std::vector<uint8_t> data = noise(8192 + 1);
  for (size_t bytes = 241; bytes < 8192; bytes += bytes < 2200 ? 1 : 61) {
    uint64_t portable[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    uint64_t avx2[8], avx512[8];
    std::copy(portable, portable + 8, avx2);
    std::copy(portable, portable + 8, avx512);
    xxh3::consume_portable(portable, data.data() + 1, bytes);
    if (cpu().isa >= Isa::kAvx2) {
      xxh3::consume_avx2(avx2, data.data() + 1, bytes);
      EXPECT(std::equal(portable, portable + 8, avx2));
    }
    if (cpu().isa >= Isa::kAvx512) {
      xxh3::consume_avx512(avx512, data.data() + 1, bytes);
      EXPECT(std::equal(portable, portable + 8, avx512));
    }
  }
}

// The specification gives no vectors; this is XXH128 of no bytes as the xxHash project prints it.
// tests/csrc/test_block.py compares all lengths with that project's own code.
void xxh3_of_nothing_is_known() {
  EXPECT(hex(xxh3_128(nullptr, 0)) == "99aa06d3014798d86001c324468d497f");
}

// Exact allocations: a sanitizer sees a read past the end at any length.
void hashes_read_nothing_outside() {
  const std::vector<uint8_t> data = noise(2100);
  for (size_t bytes = 0; bytes <= data.size(); ++bytes) {
    const std::vector<uint8_t> exact(data.begin(), data.begin() + static_cast<long>(bytes));
    EXPECT(xxh3_128(exact.data(), bytes) == xxh3_128(data.data(), bytes));
    EXPECT(sha256(exact) == sha256({data.data(), bytes}));
  }
}

constexpr ThreadTeam::Between kBetween[] = {ThreadTeam::Between::kSleep,
                                            ThreadTeam::Between::kLinger};

void a_team_covers_each_item_once(size_t threads) {
  for (const ThreadTeam::Between between : kBetween) {
    ThreadTeam team(threads, between);
    EXPECT(team.threads() == threads);
    for (const size_t items : {0, 1, 7, 1000}) {
      for (const size_t grain : {0, 1, 3, 5000}) {
        std::vector<int> seen(items);  // not atomic: the team must order pieces before its return
        team.parallel_for(items, grain, [&](size_t begin, size_t end) {
          for (size_t i = begin; i < end; ++i) ++seen[i];
        });
        EXPECT(std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; }));
      }
    }
  }
}

void a_team_serves_callers_one_by_one(ThreadTeam::Between between) {
  ThreadTeam team(3, between);
  std::vector<std::thread> callers;
  std::atomic<size_t> total{0};
  std::atomic<int> inside{0};
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int call = 0; call < 200; ++call) {
        size_t sum[8] = {};
        team.parallel_for(8, 1, [&](size_t begin, size_t) {
          EXPECT(inside.fetch_add(1) < 3);
          sum[begin] = begin;
          inside.fetch_sub(1);
        });
        for (const size_t part : sum) total += part;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT(total == 3 * 200 * 28);
}

// A thread that gives the lock back and asks again comes after the one that waits.
void a_lock_goes_to_who_asked_first() {
  TurnLock lock;
  std::string order;
  lock.lock();
  std::thread other([&] {
    const std::lock_guard<TurnLock> turn(lock);
    order += 'b';
  });
  while (lock.waiting() == 0) std::this_thread::yield();
  order += 'a';
  lock.unlock();
  lock.lock();
  order += 'c';
  lock.unlock();
  other.join();
  EXPECT(order == "abc");
}

void one_thread_at_a_time_has_the_lock() {
  TurnLock lock;
  uint32_t count = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int turn = 0; turn < 1'000; ++turn) {
        const std::lock_guard<TurnLock> held(lock);
        ++count;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(count == 4'000);
}

}  // namespace

int main() {
  sha256_agrees_with_its_specification();
  every_sha256_compresses_alike();
  every_xxh3_consumes_alike();
  xxh3_of_nothing_is_known();
  hashes_read_nothing_outside();
  for (const size_t threads : {1, 2, 5}) a_team_covers_each_item_once(threads);
  for (const auto between : kBetween) a_team_serves_callers_one_by_one(between);
  a_lock_goes_to_who_asked_first();
  one_thread_at_a_time_has_the_lock();
  return failures == 0 ? 0 : 1;
}
