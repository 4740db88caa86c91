// One contiguous copy past the caches, once per instruction set. A page is read long after it was
// copied, if at all, so filling the cache with it would cost others; and a store that skips the
// cache also skips reading the line it overwrites (measured: 1.2 to 2 times memcpy on cold pages).
//
// The files stream_*.cpp are compiled for instructions that the machine may lack: no inline
// function of the standard library there, and `Vector` lies in an unnamed namespace, since the
// linker could keep their copy for everyone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvc2::copy {

// Copies like memcpy. `next`: what will be copied after this, so that its first lines come
// meanwhile. What it has stored is ordered against other stores only by a store fence, which is
// left to the caller: once for many segments.
using Stream = void (*)(uint8_t* to, const uint8_t* from, size_t bytes, const uint8_t* next);
void stream_portable(uint8_t* to, const uint8_t* from, size_t bytes, const uint8_t* next);
void stream_avx2(uint8_t* to, const uint8_t* from, size_t bytes, const uint8_t* next);
void stream_avx512(uint8_t* to, const uint8_t* from, size_t bytes, const uint8_t* next);

constexpr size_t kLineBytes = 64;
// The hardware's prefetch stops at each 4 KiB, and knows nothing of the next segment.
constexpr size_t kAheadBytes = 2048;
// Below this, two partial lines and the fence cost more than reading the lines.
constexpr size_t kStreamBytesMin = 1024;

template <class Vector>
void stream(uint8_t* to, const uint8_t* from, size_t bytes, const uint8_t* next) {
  if (bytes < kStreamBytesMin) {
    __builtin_memcpy(to, from, bytes);
    return;
  }
  const size_t head = -reinterpret_cast<uintptr_t>(to) % kLineBytes;
  __builtin_memcpy(to, from, head);
  to += head, from += head, bytes -= head;
  constexpr size_t kStep = 4 * kLineBytes;
  for (; bytes >= kStep; to += kStep, from += kStep, bytes -= kStep) {
    const bool inside = bytes >= kAheadBytes + kStep;
    const uint8_t* ahead = inside ? from + kAheadBytes : next;
    for (size_t i = 0; i < kStep; i += kLineBytes) __builtin_prefetch(ahead + i);
    if (!inside) next += kStep;
    Vector::move4(to, from);
  }
  for (; bytes >= kLineBytes; to += kLineBytes, from += kLineBytes, bytes -= kLineBytes) {
    Vector::move1(to, from);
  }
  __builtin_memcpy(to, from, bytes);
}

}  // namespace kvc2::copy
