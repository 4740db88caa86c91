#include "index/page_pool.h"

#include "base/check.h"

namespace kvc2 {

uint32_t PagePool::add_slab() {
  uint32_t slab = 0;
  while (slab < slabs_.size() && slabs_[slab].present) ++slab;
  if (slab == slabs_.size()) {
    slabs_.emplace_back();
    pages_.resize(slabs_.size() * size_t{shape.pages_per_slab});
    if (shape.durable) generations.resize(pages_.size());
  }
  slabs_[slab].present = true;
  ++counts_.slabs;
  counts_.pages += shape.pages_per_slab;
  const PageId first = slab * shape.pages_per_slab;
  for (PageId page = first + shape.pages_per_slab; page-- > first;) {  // ascending off the list
    pages_[page].state = static_cast<uint32_t>(PageState::kFree);
    ++counts_.free;
    link(page);
  }
  return slab;
}

bool PagePool::take_slab(uint32_t slab) {
  if (slab >= slabs_.size() || !slabs_[slab].present) return false;
  if (slabs_[slab].free + slabs_[slab].gone != shape.pages_per_slab) return false;
  if (!slabs_[slab].closed) close_slab(slab);
  slabs_[slab] = Slab{};
  --counts_.slabs;
  return true;
}

bool PagePool::close_slab(uint32_t slab) {
  if (slab >= slabs_.size() || !slabs_[slab].present || slabs_[slab].closed) return false;
  const PageId first = slab * shape.pages_per_slab;
  for (PageId page = first; page < first + shape.pages_per_slab; ++page) {
    if (state(page) == PageState::kPrivate || pages_[page].pins > 0) return false;
  }
  slabs_[slab].closed = true;
  slabs_with_free_.erase(slab);
  for (PageId page = first; page < first + shape.pages_per_slab; ++page) {
    if (state(page) == PageState::kFree) set_absent(page);
  }
  slabs_[slab].free = 0;
  slabs_[slab].first_free = kNoPage;
  return true;
}

bool PagePool::reopen_slab(uint32_t slab) {
  if (!is_closed(slab)) return false;
  slabs_[slab].closed = false;
  counts_.pages += slabs_[slab].gone;
  slabs_[slab].gone = 0;
  const PageId first = slab * shape.pages_per_slab;
  for (PageId page = first + shape.pages_per_slab; page-- > first;) {
    if (state(page) != PageState::kAbsent) continue;
    pages_[page].state = static_cast<uint32_t>(PageState::kFree);
    ++counts_.free;
    link(page);
  }
  return true;
}

bool PagePool::is_closed(uint32_t slab) const {
  return slab < slabs_.size() && slabs_[slab].closed;
}

std::vector<uint32_t> PagePool::slab_pages() const {
  std::vector<uint32_t> pages;
  for (const Slab& slab : slabs_) {
    const bool open = slab.present && !slab.closed;
    pages.push_back(open ? shape.pages_per_slab - slab.free : kNoSlab);
  }
  return pages;
}

std::optional<PageId> PagePool::allocate(PageState to) {
  if (slabs_with_free_.empty()) return std::nullopt;
  const PageId page = slabs_[*slabs_with_free_.begin()].first_free;
  take(page, to);
  return page;
}

void PagePool::take(PageId page, PageState to) {
  KVC2_CHECK(is(page, PageState::kFree), "page %u is in state %d", page, int(state(page)));
  unlink(page);
  set_state(page, to);
}

void PagePool::move(PageId page, PageState to) {
  const PageState from = state(page);
  KVC2_CHECK(
      to == PageState::kResident && (from == PageState::kPrivate || from == PageState::kInFlight),
      "page %u: %d -> %d", page, int(from), int(to));
  set_state(page, to);
}

void PagePool::free(PageId page) {
  KVC2_CHECK(state(page) > PageState::kFree, "page %u is in state %d", page, int(state(page)));
  KVC2_CHECK(pages_[page].pins == 0 && !pages_[page].held, "page %u is pinned", page);
  pages_[page].refused = pages_[page].insisted = 0;
  set_state(page, PageState::kFree);
  if (slab_of(page).closed) {
    set_absent(page);
  } else {
    link(page);
  }
}

void PagePool::pin(PageId page) {
  KVC2_CHECK(state(page) >= PageState::kInFlight, "page %u has no block to pin", page);
  if (pages_[page].pins++ == 0) ++counts_.pinned;
}

void PagePool::unpin(PageId page) {
  KVC2_CHECK(pages_[page].pins > 0, "page %u has no pin", page);
  if (--pages_[page].pins == 0) --counts_.pinned;
}

void PagePool::count_eviction(bool last_copy) {
  ++counts_.evicted;
  counts_.last_copies += last_copy;
}

void PagePool::enqueue(PageId page) {
  if (!shape.below) return;
  pages_[page].refused = 0;
  if (pages_[page].queued) return;
  pages_[page].queued = 1;
  in_both_ += pages_[page].sent_back;
  undemoted.push_back(page);
}

void PagePool::send_back(PageId page) {
  if (pages_[page].queued || pages_[page].sent_back) return;
  pages_[page].sent_back = 1;
  sent_back.push_back(page);
}

void PagePool::dequeue(std::deque<PageId>& queue) {
  Page& page = pages_[queue.front()];
  in_both_ -= page.queued && page.sent_back;
  if (&queue == &sent_back) {
    page.sent_back = 0;
  } else {
    page.queued = 0;
  }
  queue.pop_front();
}

bool PagePool::on_its_way_down(PageId page) const {
  if (state(page) == PageState::kInFlight) return true;
  const Page& of = pages_[page];
  return state(page) == PageState::kResident && (of.queued || of.sent_back || of.refused);
}

size_t PagePool::waiting() const { return undemoted.size() + sent_back.size() - in_both_; }

size_t PagePool::metadata_bytes() const {
  return pages_.capacity() * sizeof(Page) + generations.capacity() * sizeof(uint64_t) +
         slabs_.capacity() * sizeof(Slab);
}

uint32_t& PagePool::count(PageState state) {
  switch (state) {
    case PageState::kFree:
      return counts_.free;
    case PageState::kPrivate:
      return counts_.private_;
    case PageState::kInFlight:
      return counts_.in_flight;
    default:
      KVC2_CHECK(state == PageState::kResident, "no count of state %d", int(state));
      return counts_.resident;
  }
}

void PagePool::set_state(PageId page, PageState to) {
  --count(state(page));
  ++count(to);
  pages_[page].state = static_cast<uint32_t>(to);
}

// A free page, on no list, of a slab that is closed.
void PagePool::set_absent(PageId page) {
  const Page before = pages_[page];  // the queues still hold its number
  pages_[page] = Page{};
  pages_[page].queued = before.queued;
  pages_[page].sent_back = before.sent_back;
  ++slab_of(page).gone;
  --counts_.free;
  --counts_.pages;
}

void PagePool::link(PageId page) {
  const uint32_t number = page / shape.pages_per_slab;
  Slab& slab = slabs_[number];
  pages_[page].node = slab.first_free;
  pages_[page].block = kNoPage;
  if (slab.first_free != kNoPage) pages_[slab.first_free].block = page;
  slab.first_free = page;
  if (slab.free++ == 0) slabs_with_free_.insert(number);
}

void PagePool::unlink(PageId page) {
  const uint32_t number = page / shape.pages_per_slab;
  Slab& slab = slabs_[number];
  const auto [next, previous] = std::pair(pages_[page].node, pages_[page].block);
  if (next != kNoPage) pages_[next].block = previous;
  if (previous != kNoPage) pages_[previous].node = next;
  if (slab.first_free == page) slab.first_free = next;
  pages_[page].node = pages_[page].block = kNoPage;
  if (--slab.free == 0) slabs_with_free_.erase(number);
}

}  // namespace kvc2
