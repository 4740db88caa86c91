// Memory of the hostile driver: physical blocks, device addresses, registered host memory.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "state.h"

using hostile::Kind;
using hostile::Range;
using hostile::the_driver;

namespace hostile {

Block::~Block() {
  if (alias) munmap(alias, bytes);
  if (fd >= 0) close(fd);
}

bool Block::map() {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return false;
  alias = static_cast<uint8_t*>(at);
  return true;
}

std::shared_ptr<Block> new_block(size_t bytes, int device) {
  auto block = std::make_shared<Block>();
  const std::string name = "hostile-device-" + std::to_string(device);
  block->fd = memfd_create(name.c_str(), MFD_CLOEXEC);
  block->bytes = bytes;
  block->device = device;
  if (block->fd < 0 || ftruncate(block->fd, static_cast<off_t>(bytes)) != 0 || !block->map())
    return nullptr;
  memset(block->alias, kPoison, bytes);  // never zero by luck
  return block;
}

std::map<CUdeviceptr, Range>::iterator range_of(CUdeviceptr at) {
  auto found = the_driver->ranges.upper_bound(at);
  if (found == the_driver->ranges.begin()) return the_driver->ranges.end();
  --found;
  return at < found->first + found->second.bytes ? found : the_driver->ranges.end();
}

static uint8_t* device_bytes(CUdeviceptr at, size_t bytes) {
  const auto found = range_of(at);
  if (found == the_driver->ranges.end()) return nullptr;
  const Range& range = found->second;
  const size_t inside = at - found->first;
  if (!range.block || !range.access || bytes > range.bytes - inside) return nullptr;
  if (t_contexts.size() && range.block->device != t_contexts.back()) return nullptr;
  return range.block->alias + inside;
}

// In one registration: a copy must not span two.
static bool is_pinned(uintptr_t at, size_t bytes, bool write) {
  auto found = the_driver->pinned.upper_bound(at);
  if (found == the_driver->pinned.begin()) return false;
  --found;
  const size_t inside = at - found->first;
  const Pinned& pinned = found->second;
  return bytes <= pinned.bytes && inside <= pinned.bytes - bytes && !(write && pinned.read_only);
}

uint8_t* bytes_of(const Place& place, bool write) {
  std::lock_guard lock(the_driver->mutex);
  if (place.device) return device_bytes(place.at, place.bytes);
  const bool there = is_pinned(place.at, place.bytes, write);
  return there ? reinterpret_cast<uint8_t*>(place.at) : nullptr;
}

}  // namespace hostile

namespace {

// Writable unless it is to be read alone: what the maps say.
bool is_mapped(uintptr_t begin, size_t bytes, bool read_only) {
  FILE* maps = fopen("/proc/self/maps", "r");
  uintptr_t reached = begin;
  char row[512];
  while (maps && reached < begin + bytes && fgets(row, sizeof row, maps)) {
    unsigned long from, to;
    char mode[8];
    if (sscanf(row, "%lx-%lx %7s", &from, &to, mode) != 3 || to <= reached || from > reached)
      continue;
    if (mode[0] != 'r' || (!read_only && mode[1] != 'w')) break;
    reached = to;
  }
  if (maps) fclose(maps);
  return reached >= begin + bytes;
}

// Guard pages on both sides, never given back: neighbours are not adjacent, addresses not reused,
// and a host that touches one dies.
CUdeviceptr reserve(size_t bytes) {
  void* at = mmap(nullptr, bytes + 2 * hostile::kGranule, PROT_NONE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return 0;
  const uint64_t begin = reinterpret_cast<uint64_t>(at) + hostile::kGranule;
  return begin / hostile::kGranule * hostile::kGranule;
}

}  // namespace

HOSTILE_API CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
  HOSTILE_ENTER(cuMemAlloc);
  if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  auto block = hostile::new_block(bytes, hostile::t_contexts.back());
  const CUdeviceptr at = reserve(bytes);
  if (!block || !at) return CUDA_ERROR_OUT_OF_MEMORY;
  std::lock_guard lock(the_driver->mutex);
  the_driver->ranges[at] = Range{bytes, Kind::kAllocated, true, block};
  *out = at;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemFree_v2(CUdeviceptr at) {
  HOSTILE_ENTER(cuMemFree);
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->ranges.find(at);
  if (found == the_driver->ranges.end() || found->second.kind != Kind::kAllocated)
    return CUDA_ERROR_INVALID_VALUE;
  if (hostile::is_in_use(at, found->second.bytes)) hostile::violate("cuMemFree with work pending");
  the_driver->ranges.erase(found);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  HOSTILE_ENTER(cuMemGetInfo);
  *free_bytes = *total = 1ull << 30;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemHostRegister_v2(void* at, size_t bytes, unsigned flags) {
  HOSTILE_ENTER(cuMemHostRegister);
  const auto begin = reinterpret_cast<uintptr_t>(at);
  const bool read_only = flags & kHostRegisterReadOnly;
  if (bytes == 0 || begin % 4096 || bytes % 4096) {
    hostile::violate("cuMemHostRegister of what is not whole pages");
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (bytes >= (512ull << 30)) return CUDA_ERROR_OUT_OF_MEMORY;  // vllm-project/vllm#51080
  if (!is_mapped(begin, bytes, read_only)) {
    hostile::violate("cuMemHostRegister of what is not mapped, or is read-only");
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::lock_guard lock(the_driver->mutex);
  for (const auto& [other, pinned] : the_driver->pinned)
    if (begin < other + pinned.bytes && other < begin + bytes)
      return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  the_driver->pinned[begin] = {bytes, read_only};
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemHostUnregister(void* at) {
  HOSTILE_ENTER(cuMemHostUnregister);
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->pinned.find(reinterpret_cast<uintptr_t>(at));
  if (found == the_driver->pinned.end()) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  if (hostile::is_in_use(found->first, found->second.bytes))
    hostile::violate("cuMemHostUnregister with work pending");
  the_driver->pinned.erase(found);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemAddressReserve(CUdeviceptr* out, size_t bytes, size_t, CUdeviceptr,
                                         unsigned long long) {
  HOSTILE_ENTER(cuMemAddressReserve);
  if (bytes == 0 || bytes % hostile::kGranule) return CUDA_ERROR_INVALID_VALUE;
  *out = reserve(bytes);
  if (!*out) return CUDA_ERROR_OUT_OF_MEMORY;
  std::lock_guard lock(the_driver->mutex);
  the_driver->ranges[*out] = Range{bytes, Kind::kReserved, false, nullptr};
  return CUDA_SUCCESS;
}
