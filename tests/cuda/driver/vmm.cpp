// The hostile driver's virtual memory management: memory that is made, named by a file descriptor,
// mapped in any process that has one, and alive while anybody maps it.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "state.h"

using hostile::Kind;
using hostile::the_driver;

namespace {

// The device whose memory a descriptor is of; -1: it is no memory of ours.
int device_of(int fd) {
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  char name[128] = {};
  int device = -1;
  if (readlink(link.c_str(), name, sizeof name - 1) < 0) return -1;
  return sscanf(name, "/memfd:hostile-device-%d", &device) == 1 ? device : -1;
}

}  // namespace

HOSTILE_API CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*, int) {
  HOSTILE_ENTER(cuMemGetAllocationGranularity);
  *bytes = hostile::kGranule;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemCreate(uint64_t* handle, size_t bytes, const CUmemAllocationProp* prop,
                                 unsigned long long) {
  HOSTILE_ENTER(cuMemCreate);
  const bool of_device = prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE;
  if (bytes == 0 || bytes % hostile::kGranule || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
      !of_device || prop->location.id >= the_driver->devices)
    return CUDA_ERROR_INVALID_VALUE;
  auto block = hostile::new_block(bytes, prop->location.id);
  if (!block) return CUDA_ERROR_OUT_OF_MEMORY;
  block->exportable = prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  *handle = hostile::new_id();
  std::lock_guard lock(the_driver->mutex);
  the_driver->handles[*handle] = block;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemExportToShareableHandle(void* out, uint64_t handle, int type,
                                                  unsigned long long) {
  HOSTILE_ENTER(cuMemExportToShareableHandle);
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->handles.find(handle);
  if (found == the_driver->handles.end() || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR ||
      !found->second->exportable)
    return CUDA_ERROR_INVALID_VALUE;
  *static_cast<int*>(out) = fcntl(found->second->fd, F_DUPFD_CLOEXEC, 3);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemImportFromShareableHandle(uint64_t* handle, void* os_handle, int type) {
  HOSTILE_ENTER(cuMemImportFromShareableHandle);
  const int fd = static_cast<int>(reinterpret_cast<intptr_t>(os_handle));
  struct stat status;
  auto block = std::make_shared<hostile::Block>();
  block->device = device_of(fd);
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || block->device < 0 ||
      fstat(fd, &status) != 0)
    return CUDA_ERROR_INVALID_VALUE;
  block->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  block->bytes = static_cast<size_t>(status.st_size);
  if (!block->map()) return CUDA_ERROR_INVALID_VALUE;
  *handle = hostile::new_id();
  std::lock_guard lock(the_driver->mutex);
  the_driver->handles[*handle] = block;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemRelease(uint64_t handle) {
  HOSTILE_ENTER(cuMemRelease);
  std::lock_guard lock(the_driver->mutex);
  return the_driver->handles.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
HOSTILE_API CUresult cuMemAddressFree(CUdeviceptr at, size_t bytes) {
  HOSTILE_ENTER(cuMemAddressFree);
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->ranges.find(at);
  if (found == the_driver->ranges.end() || found->second.kind != Kind::kReserved ||
      found->second.bytes != bytes) {
    hostile::violate("cuMemAddressFree of what is mapped, or of another size");
    return CUDA_ERROR_INVALID_VALUE;
  }
  the_driver->ranges.erase(found);
  return CUDA_SUCCESS;
}
// Simpler than the real one: a reservation is mapped whole.
HOSTILE_API CUresult cuMemMap(CUdeviceptr at, size_t bytes, size_t offset, uint64_t handle,
                              unsigned long long) {
  HOSTILE_ENTER(cuMemMap);
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->ranges.find(at);
  const auto block = the_driver->handles.find(handle);
  if (found == the_driver->ranges.end() || found->second.kind != Kind::kReserved ||
      block == the_driver->handles.end() || offset != 0 || bytes != found->second.bytes ||
      bytes > block->second->bytes)
    return CUDA_ERROR_INVALID_VALUE;
  found->second.kind = Kind::kMapped;
  found->second.block = block->second;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemSetAccess(CUdeviceptr at, size_t bytes, const CUmemAccessDesc* wanted,
                                    size_t count) {
  HOSTILE_ENTER(cuMemSetAccess);
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->ranges.find(at);
  if (found == the_driver->ranges.end() || found->second.kind != Kind::kMapped ||
      bytes != found->second.bytes || count != 1 ||
      wanted->location.id != found->second.block->device)
    return CUDA_ERROR_INVALID_VALUE;
  found->second.access = wanted->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemUnmap(CUdeviceptr at, size_t bytes) {
  HOSTILE_ENTER(cuMemUnmap);
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->ranges.find(at);
  if (found == the_driver->ranges.end() || found->second.kind != Kind::kMapped ||
      bytes != found->second.bytes)
    return CUDA_ERROR_INVALID_VALUE;
  if (hostile::is_in_use(at, bytes)) hostile::violate("cuMemUnmap with work pending");
  found->second.kind = Kind::kReserved;
  found->second.access = false;
  found->second.block = nullptr;
  return CUDA_SUCCESS;
}
