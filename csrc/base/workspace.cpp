#include "base/workspace.h"

#include <cstdlib>

#include "base/check.h"

namespace kvc2 {

void Scratch::Free::operator()(void* memory) const { std::free(memory); }

void* Scratch::reserve(size_t bytes) {
  if (bytes > size_) {
    size_ = (bytes + 4095) / 4096 * 4096;
    memory_.reset(std::aligned_alloc(4096, size_));
    KVC2_CHECK(memory_ != nullptr, "no %zu bytes of scratch", size_);
  }
  return memory_.get();
}

}  // namespace kvc2
