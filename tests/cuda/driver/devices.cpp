// The hostile driver's versions, devices and contexts, and how others find its calls.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

using hostile::t_contexts;
using hostile::the_driver;

namespace {

CUcontext primary(int device) {
  return reinterpret_cast<CUcontext>(0x5eedc0de000ull + static_cast<uint64_t>(device));
}
// -1: no context of ours, or one that nobody has retained.
int device_of(CUcontext context) {
  const auto number = reinterpret_cast<uint64_t>(context) - 0x5eedc0de000ull;
  const auto device = static_cast<int>(number);
  const bool known = number < the_driver->retained.size();
  return known && the_driver->retained[number] > 0 ? device : -1;
}
bool is_device(CUdevice device) { return device >= 0 && device < the_driver->devices; }

struct ErrorName {
  int code;
  const char* name;
};
constexpr ErrorName kErrorNames[] = {
    {0, "CUDA_SUCCESS"},
    {1, "CUDA_ERROR_INVALID_VALUE"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY"},
    {3, "CUDA_ERROR_NOT_INITIALIZED"},
    {100, "CUDA_ERROR_NO_DEVICE"},
    {101, "CUDA_ERROR_INVALID_DEVICE"},
    {201, "CUDA_ERROR_INVALID_CONTEXT"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE"},
    {400, "CUDA_ERROR_INVALID_HANDLE"},
    {500, "CUDA_ERROR_NOT_FOUND"},
    {600, "CUDA_ERROR_NOT_READY"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
    {719, "CUDA_ERROR_LAUNCH_FAILED"},
};

}  // namespace

HOSTILE_API CUresult cuInit(unsigned flags) {
  static std::mutex once;
  std::lock_guard lock(once);
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (the_driver == nullptr) {
    auto* driver = new hostile::Driver;
    driver->pid = getpid();
    driver->retained.resize(1);
    the_driver = driver;
    if (const CUresult bad = hostile::set_words(getenv("HOSTILE"))) return bad;
  }
  if (the_driver->pid != getpid()) return CUDA_ERROR_NOT_INITIALIZED;
  the_driver->initialised = true;
  if (const CUresult bad = hostile::enter("cuInit", false)) return bad;
  return the_driver->devices ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}
HOSTILE_API CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = nullptr;
  for (const ErrorName& each : kErrorNames)
    if (each.code == error) *name = each.name;
  return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
HOSTILE_API CUresult cuGetErrorString(CUresult error, const char** text) {
  return cuGetErrorName(error, text);
}

HOSTILE_API CUresult cuDeviceGetCount(int* count) {
  HOSTILE_ENTER_ANYWHERE(cuDeviceGetCount);
  *count = the_driver->devices;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  HOSTILE_ENTER_ANYWHERE(cuDeviceGet);
  *device = ordinal;
  return is_device(ordinal) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
HOSTILE_API CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  HOSTILE_ENTER_ANYWHERE(cuDeviceGetName);
  snprintf(name, static_cast<size_t>(length), "hostile driver");
  return is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
HOSTILE_API CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  HOSTILE_ENTER_ANYWHERE(cuDeviceGetUuid);
  memcpy(uuid->bytes, "hostile-driver-0", 16);
  uuid->bytes[15] = static_cast<char>('0' + device);
  return is_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
HOSTILE_API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
  HOSTILE_ENTER_ANYWHERE(cuDeviceTotalMem);
  *bytes = 1ull << 30;
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice) {
  HOSTILE_ENTER_ANYWHERE(cuDeviceGetAttribute);
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_PITCH:
      *value = static_cast<int>(the_driver->max_pitch);
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 4;
      break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      *value = 3;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED:
      *value = 1;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

HOSTILE_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  HOSTILE_ENTER_ANYWHERE(cuDevicePrimaryCtxRetain);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::lock_guard lock(the_driver->mutex);
  ++the_driver->retained[static_cast<size_t>(device)];
  *context = primary(device);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  HOSTILE_ENTER_ANYWHERE(cuDevicePrimaryCtxRelease);
  std::lock_guard lock(the_driver->mutex);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  int& retained = the_driver->retained[static_cast<size_t>(device)];
  if (retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (--retained == 0 && hostile::is_in_use(0, ~0ull))
    the_driver->violations.push_back("a context was released with work pending");
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuCtxSetCurrent(CUcontext context) {
  HOSTILE_ENTER_ANYWHERE(cuCtxSetCurrent);
  std::lock_guard lock(the_driver->mutex);
  const int device = context ? device_of(context) : -1;
  if (context && device < 0) return CUDA_ERROR_INVALID_CONTEXT;
  t_contexts.clear();
  if (context) t_contexts.push_back(device);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuCtxGetCurrent(CUcontext* context) {
  HOSTILE_ENTER_ANYWHERE(cuCtxGetCurrent);
  *context = t_contexts.empty() ? nullptr : primary(t_contexts.back());
  return CUDA_SUCCESS;
}

// Most programs ask for each call by name; what isn't here is told to be missing.
HOSTILE_API CUresult cuGetProcAddress_v2(const char* symbol, void** out, int, uint64_t,
                                         int* status) {
  static const bool log = getenv("HOSTILE_LOG") != nullptr;
  Dl_info own;
  *out = nullptr;
  if (dladdr(reinterpret_cast<void*>(&cuInit), &own)) {
    void* library = dlopen(own.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    const std::string name(symbol);
    for (const std::string& each : {name + "_v2", name})
      if (*out == nullptr && library) *out = dlsym(library, each.c_str());
    if (library) dlclose(library);
  }
  if (log) fprintf(stderr, "hostile: %s%s\n", symbol, *out ? "" : " is missing");
  if (status) *status = *out ? 0 : 1;
  return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
HOSTILE_API CUresult cuGetProcAddress(const char* symbol, void** out, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, out, version, flags, nullptr);
}
