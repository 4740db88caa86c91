#include "base/workspace.h"

#include <sys/mman.h>

#include <cstdlib>

#include "base/check.h"

namespace kvc2 {
namespace {

constexpr size_t kPage = 4096, kHugePage = 2 << 20;

}  // namespace

void Scratch::Free::operator()(void* memory) const { std::free(memory); }

void* Scratch::reserve(size_t bytes) {
  if (bytes > size_) {
    const size_t page = bytes < kHugePage ? kPage : kHugePage;
    size_ = (bytes + page - 1) / page * page;
    memory_.reset(std::aligned_alloc(page, size_));
    KVC2_CHECK(memory_ != nullptr, "no %zu bytes of scratch", size_);
    // Where the host grants them; tiles of a panel miss fewer translations then.
    if (page == kHugePage) madvise(memory_.get(), size_, MADV_HUGEPAGE);
  }
  return memory_.get();
}

}  // namespace kvc2
