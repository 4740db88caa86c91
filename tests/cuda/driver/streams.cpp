// Streams and events of the hostile driver: work runs late, on a thread of each stream.
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "state.h"

using hostile::Event;
using hostile::Stream;
using hostile::the_driver;

namespace hostile {

void wait_late() {
  if (the_driver->late_us)
    std::this_thread::sleep_for(std::chrono::microseconds(pick(the_driver->late_us)));
}

bool is_in_use(uint64_t at, size_t bytes) {
  std::lock_guard lock(the_driver->mutex);
  for (const auto& [id, stream] : the_driver->streams) {
    std::lock_guard inner(stream->mutex);
    for (const Work& work : stream->work)
      for (const Place& place : work.touches)
        if (place.overlaps(at, bytes)) return true;
  }
  return false;
}

// What a stream holds when the context is poisoned is dropped, and nobody is told.
static void run(const Work& work) {
  if (the_driver->sticky) return;
  while (work.hangs && !the_driver->sticky)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  wait_late();
  if (the_driver->sticky) return;
  const CUresult bad = work.run();
  if (!bad) return;
  violate(work.name + " failed when its turn came");
  the_driver->sticky = is_sticky(bad) ? bad : CUDA_ERROR_LAUNCH_FAILED;
}

static void serve(const std::shared_ptr<Stream>& stream) {
  std::unique_lock lock(stream->mutex);
  while (true) {
    stream->changed.wait(lock, [&] { return stream->stop || !stream->work.empty(); });
    if (stream->work.empty()) return;
    const Work& first = stream->work.front();  // a deque: it stays where it is
    lock.unlock();
    run(first);
    lock.lock();
    stream->work.pop_front();
    ++stream->done;
    stream->changed.notify_all();
  }
}

CUresult queue(CUstream handle, Work work) {
  std::unique_lock all(the_driver->mutex);
  if (reinterpret_cast<uint64_t>(handle) <= 2) {
    violate(work.name + " on a default stream");
    return CUDA_ERROR_INVALID_VALUE;
  }
  const auto found = the_driver->streams.find(reinterpret_cast<uint64_t>(handle));
  if (found == the_driver->streams.end() || found->second->device != t_contexts.back()) {
    violate(work.name + " on a stream that is not this context's");
    return CUDA_ERROR_INVALID_HANDLE;
  }
  const std::shared_ptr<Stream> stream = found->second;
  all.unlock();
  std::lock_guard lock(stream->mutex);
  stream->work.push_back(std::move(work));
  ++stream->queued;
  stream->changed.notify_all();
  return CUDA_SUCCESS;
}

}  // namespace hostile

namespace {

constexpr auto kLook = std::chrono::milliseconds(5);

std::shared_ptr<Stream> stream_of(CUstream handle) {
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->streams.find(reinterpret_cast<uint64_t>(handle));
  return found == the_driver->streams.end() ? nullptr : found->second;
}
std::shared_ptr<Event> event_of(CUevent handle) {
  std::lock_guard lock(the_driver->mutex);
  const auto found = the_driver->events.find(reinterpret_cast<uint64_t>(handle));
  return found == the_driver->events.end() ? nullptr : found->second;
}

}  // namespace

HOSTILE_API CUresult cuStreamCreateWithPriority(CUstream* out, unsigned flags, int) {
  HOSTILE_ENTER(cuStreamCreateWithPriority);
  if (flags != CU_STREAM_NON_BLOCKING)
    hostile::violate("a stream that is not NON_BLOCKING waits for the default stream");
  auto stream = std::make_shared<Stream>();
  stream->device = hostile::t_contexts.back();
  std::thread thread([stream] {
    pthread_setname_np(pthread_self(), "hostile-stream");
    hostile::serve(stream);
  });
  thread.detach();
  const uint64_t id = hostile::new_id();
  std::lock_guard lock(the_driver->mutex);
  the_driver->streams[id] = stream;
  *out = reinterpret_cast<CUstream>(id);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuStreamCreate(CUstream* out, unsigned flags) {
  return cuStreamCreateWithPriority(out, flags, 0);
}
HOSTILE_API CUresult cuStreamDestroy_v2(CUstream handle) {
  HOSTILE_ENTER(cuStreamDestroy);
  const auto stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  {
    std::lock_guard lock(stream->mutex);
    for (const hostile::Work& work : stream->work) {  // an event may have been told just now
      if (!work.touches.empty()) hostile::violate("cuStreamDestroy with work pending");
    }
    stream->stop = true;  // what it holds still runs
    stream->changed.notify_all();
  }
  std::lock_guard lock(the_driver->mutex);
  the_driver->streams.erase(reinterpret_cast<uint64_t>(handle));
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuStreamSynchronize(CUstream handle) {
  HOSTILE_ENTER(cuStreamSynchronize);
  const auto stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  std::unique_lock lock(stream->mutex);
  const uint64_t wanted = stream->queued;
  stream->changed.wait(lock, [&] { return stream->done >= wanted; });
  return the_driver->sticky;
}
HOSTILE_API CUresult cuStreamQuery(CUstream handle) {
  HOSTILE_ENTER(cuStreamQuery);
  const auto stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  std::lock_guard lock(stream->mutex);
  return stream->done == stream->queued ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

HOSTILE_API CUresult cuEventCreate(CUevent* out, unsigned) {
  HOSTILE_ENTER(cuEventCreate);
  const uint64_t id = hostile::new_id();
  std::lock_guard lock(the_driver->mutex);
  the_driver->events[id] = std::make_shared<Event>();
  *out = reinterpret_cast<CUevent>(id);
  return CUDA_SUCCESS;
}
HOSTILE_API CUresult cuEventDestroy_v2(CUevent handle) {
  HOSTILE_ENTER(cuEventDestroy);
  std::lock_guard lock(the_driver->mutex);
  const bool there = the_driver->events.erase(reinterpret_cast<uint64_t>(handle)) > 0;
  return there ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
HOSTILE_API CUresult cuEventRecord(CUevent handle, CUstream stream) {
  HOSTILE_ENTER(cuEventRecord);
  const auto event = event_of(handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  uint64_t generation;
  {
    std::lock_guard lock(event->mutex);
    generation = ++event->recorded;
  }
  const auto complete = [event, generation] {
    std::lock_guard lock(event->mutex);
    event->completed = std::max(event->completed, generation);
    event->changed.notify_all();
    return static_cast<int>(CUDA_SUCCESS);
  };
  return hostile::queue(stream, {"cuEventRecord", complete, {}, false});
}
HOSTILE_API CUresult cuEventQuery(CUevent handle) {
  HOSTILE_ENTER(cuEventQuery);
  const auto event = event_of(handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  std::lock_guard lock(event->mutex);
  return event->completed == event->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
HOSTILE_API CUresult cuEventSynchronize(CUevent handle) {
  HOSTILE_ENTER(cuEventSynchronize);
  const auto event = event_of(handle);
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  std::unique_lock lock(event->mutex);
  const uint64_t wanted = event->recorded;
  while (event->completed < wanted && !the_driver->sticky) event->changed.wait_for(lock, kLook);
  return the_driver->sticky;
}

// The host's own work, in its stream's order. It may not call the driver, as cuda.h says.
HOSTILE_API CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  HOSTILE_ENTER(cuLaunchHostFunc);
  const auto call = [function, data] {
    hostile::t_calls_host = true;
    function(data);
    hostile::t_calls_host = false;
    return static_cast<int>(CUDA_SUCCESS);
  };
  return hostile::queue(stream, {"cuLaunchHostFunc", call, {}, false});
}
