// What the hostile driver knows of one process: its words, its memory, its streams, what was wrong.
// Not here: the API itself (devices, memory, vmm, copies, streams .cpp).
#pragma once
#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "abi.h"

#define HOSTILE_API extern "C" __attribute__((visibility("default")))

namespace hostile {

inline constexpr size_t kGranule = 2 << 20;
inline constexpr uint8_t kPoison = 0xDB;  // what memory holds that nobody has written to

// Physical memory of a device: a memfd, and the driver's own map of it.
struct Block {
  int fd = -1;
  size_t bytes = 0;
  uint8_t* alias = nullptr;
  int device = 0;
  bool exportable = false;

  ~Block();
  bool map();  // `bytes` of `fd`
};
std::shared_ptr<Block> new_block(size_t bytes, int device);

// Of device addresses.
enum class Kind { kAllocated, kReserved, kMapped };
struct Range {
  size_t bytes = 0;
  Kind kind = Kind::kAllocated;
  bool access = false;
  std::shared_ptr<Block> block;
};

struct Pinned {
  size_t bytes;
  bool read_only;
};

// An operand of a copy. It is looked at when the copy is queued, and again when its turn comes.
struct Place {
  bool device;
  uint64_t at;
  size_t bytes;

  bool overlaps(uint64_t begin, size_t length) const {
    return at < begin + length && begin < at + bytes;
  }
};

struct Work {
  std::string name;
  std::function<CUresult()> run;
  std::vector<Place> touches;
  bool hangs = false;
};

struct Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Work> work;  // the first is under way
  uint64_t queued = 0, done = 0;
  bool stop = false;
  int device = 0;
};

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0, completed = 0;  // generations
};

// A call that shall go wrong: its number among those of its name, counted from 1.
struct Fault {
  uint64_t at;
  int code;  // kHangs: the work that it queues never ends
};
inline constexpr int kHangs = -1;

// Guarded by `mutex` but for `sticky`; `random` by its own.
struct Driver {
  std::recursive_mutex mutex;
  bool initialised = false;
  pid_t pid = 0;
  std::atomic<int> sticky{0};
  uint64_t next_id = 1;

  uint64_t late_us = 1000;
  int devices = 1;
  uint64_t max_pitch = (1ull << 31) - 1;
  std::map<std::string, std::vector<Fault>> faults;
  std::map<std::string, uint64_t> calls;
  std::vector<std::string> violations;

  std::vector<int> retained = {};  // by device
  std::map<CUdeviceptr, Range> ranges;
  std::map<uintptr_t, Pinned> pinned;
  std::map<uint64_t, std::shared_ptr<Block>> handles;
  std::map<uint64_t, std::shared_ptr<Stream>> streams;
  std::map<uint64_t, std::shared_ptr<Event>> events;

  std::mutex random_mutex;
  std::mt19937_64 random{1};
};

extern Driver* the_driver;                        // made by cuInit
extern thread_local std::vector<int> t_contexts;  // devices whose context is current, last on top
extern thread_local bool t_calls_host;            // whether this thread is in a host function

// What every call of the API asks first. Not CUDA_SUCCESS: the call's answer.
CUresult enter(const char* name, bool needs_context);
// Whether the work that this call queues shall never end.
bool hangs(const char* name);
CUresult set_words(const char* words);
void violate(const std::string& what);
bool is_sticky(int code);
uint64_t pick(uint64_t below);
uint64_t new_id();

// The range that holds an address, or the end.
std::map<CUdeviceptr, Range>::iterator range_of(CUdeviceptr at);
// Where the bytes of a place lie for the driver itself. nullptr: an illegal address.
uint8_t* bytes_of(const Place& place, bool write);
// Whether work that was queued and has not ended touches these addresses.
bool is_in_use(uint64_t at, size_t bytes);

CUresult queue(CUstream stream, Work work);
void wait_late();

}  // namespace hostile

#define HOSTILE_ENTER(name) \
  if (const CUresult bad = hostile::enter(#name, true)) return bad
#define HOSTILE_ENTER_ANYWHERE(name) \
  if (const CUresult bad = hostile::enter(#name, false)) return bad
