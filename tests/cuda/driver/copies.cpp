// Copies of the hostile driver. A destination is poison from the moment its turn comes until its
// bytes are there, a row at a time, in an order that nobody can rely on.
#include <cstring>
#include <string>

#include "state.h"

using hostile::Place;
using hostile::the_driver;

namespace {

struct Side {
  Place place;
  size_t pitch;
};
struct Rows {
  Side to, from;
  size_t width, height;
};

Side side(bool device, uint64_t at, const Rows& rows, size_t pitch) {
  const size_t bytes = rows.height ? (rows.height - 1) * pitch + rows.width : 0;
  return {{device, at, bytes}, pitch};
}

CUresult check(const char* name, const Rows& rows) {
  for (const bool write : {true, false}) {
    const Place& place = write ? rows.to.place : rows.from.place;
    if (hostile::bytes_of(place, write)) continue;
    const char* why = place.device ? " of what is not device memory"
                                   : " of host memory that is not"
                                     " in one registration";
    hostile::violate(name + std::string(why) + (write ? ", written" : ", read"));
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult run(const Rows& rows, int device) {
  hostile::t_contexts.assign(1, device);  // of the stream's own thread
  if (rows.width == 0 || rows.height == 0) return CUDA_SUCCESS;
  uint8_t* to = hostile::bytes_of(rows.to.place, true);
  const uint8_t* from = hostile::bytes_of(rows.from.place, false);
  if (!to || !from) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (the_driver->late_us) {
    for (size_t row = 0; row < rows.height; ++row)
      memset(to + row * rows.to.pitch, hostile::kPoison, rows.width);
    hostile::wait_late();
  }
  const size_t first = hostile::pick(rows.height);
  for (size_t i = 0; i < rows.height; ++i) {
    const size_t row = (first + i) % rows.height;
    memcpy(to + row * rows.to.pitch, from + row * rows.from.pitch, rows.width);
  }
  return CUDA_SUCCESS;
}

CUresult copy(const char* name, const Rows& rows, CUstream stream) {
  if (const CUresult bad = check(name, rows)) return bad;
  const int device = hostile::t_contexts.back();
  return hostile::queue(stream, {name,
                                 [rows, device] { return run(rows, device); },
                                 {rows.to.place, rows.from.place},
                                 hostile::hangs(name)});
}

Rows line(bool to_device, uint64_t to, uint64_t from, size_t bytes) {
  Rows rows{{}, {}, bytes, 1};
  rows.to = side(to_device, to, rows, bytes);
  rows.from = side(!to_device, from, rows, bytes);
  return rows;
}

}  // namespace

HOSTILE_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes,
                                          CUstream stream) {
  HOSTILE_ENTER(cuMemcpyHtoDAsync);
  return copy("cuMemcpyHtoDAsync", line(true, to, reinterpret_cast<uint64_t>(from), bytes), stream);
}
HOSTILE_API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes,
                                          CUstream stream) {
  HOSTILE_ENTER(cuMemcpyDtoHAsync);
  return copy("cuMemcpyDtoHAsync", line(false, reinterpret_cast<uint64_t>(to), from, bytes),
              stream);
}
// At once, and from any host memory.
HOSTILE_API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  HOSTILE_ENTER(cuMemcpyHtoD);
  uint8_t* there = hostile::bytes_of({true, to, bytes}, true);
  if (!there) return CUDA_ERROR_INVALID_VALUE;
  memcpy(there, from, bytes);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  HOSTILE_ENTER(cuMemcpyDtoH);
  const uint8_t* there = hostile::bytes_of({true, from, bytes}, false);
  if (!there) return CUDA_ERROR_INVALID_VALUE;
  memcpy(to, there, bytes);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* asked, CUstream stream) {
  HOSTILE_ENTER(cuMemcpy2DAsync);
  const auto known = [](int type) {
    return type == CU_MEMORYTYPE_HOST || type == CU_MEMORYTYPE_DEVICE;
  };
  const size_t most = the_driver->max_pitch;
  if (!known(asked->srcMemoryType) || !known(asked->dstMemoryType) ||
      asked->WidthInBytes > asked->srcPitch || asked->WidthInBytes > asked->dstPitch ||
      asked->srcPitch > most || asked->dstPitch > most) {
    hostile::violate("cuMemcpy2DAsync: a pitch or a memory type that is not allowed");
    return CUDA_ERROR_INVALID_VALUE;
  }
  Rows rows{{}, {}, asked->WidthInBytes, asked->Height};
  const auto at = [](int type, const void* host, CUdeviceptr device) {
    return type == CU_MEMORYTYPE_DEVICE ? device : reinterpret_cast<uint64_t>(host);
  };
  const uint64_t to = at(asked->dstMemoryType, asked->dstHost, asked->dstDevice);
  const uint64_t from = at(asked->srcMemoryType, asked->srcHost, asked->srcDevice);
  rows.to = side(asked->dstMemoryType == CU_MEMORYTYPE_DEVICE,
                 to + asked->dstY * asked->dstPitch + asked->dstXInBytes, rows, asked->dstPitch);
  rows.from =
      side(asked->srcMemoryType == CU_MEMORYTYPE_DEVICE,
           from + asked->srcY * asked->srcPitch + asked->srcXInBytes, rows, asked->srcPitch);
  return copy("cuMemcpy2DAsync", rows, stream);
}
HOSTILE_API CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes,
                                     CUstream stream) {
  HOSTILE_ENTER(cuMemsetD8Async);
  const Place place{true, at, bytes};
  if (!hostile::bytes_of(place, true)) return CUDA_ERROR_INVALID_VALUE;
  const auto set = [place, value] {
    uint8_t* there = hostile::bytes_of(place, true);
    if (!there) return static_cast<int>(CUDA_ERROR_ILLEGAL_ADDRESS);
    memset(there, value, place.bytes);
    return static_cast<int>(CUDA_SUCCESS);
  };
  return hostile::queue(stream, {"cuMemsetD8Async", set, {place}, false});
}
