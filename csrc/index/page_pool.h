// The pages of one pool, and who owns each. A page is a number here; its bytes are elsewhere
// (kvc2/tiers).
//
//   slab 0            slab 1 (taken)    slab 2
//   [0 1 2 3 .. p-1]                    [2p 2p+1 .. 3p-1]        page = slab * pages_per_slab + i
//
// A page is in one state:
//   from      -> to         [function]        for whom
//   absent    -> free       [add_slab]
//   free      -> private    [allocate, take]  a session's grant
//   free      -> in_flight  [allocate]        a transfer into this pool
//   free      -> resident   [take]            restore from a catalogue
//   private   -> resident   [move]            commit: adopted
//   in_flight -> resident   [move]            complete
//   private, in_flight, resident -> free [free]   give back; fail; evict
//   free      -> absent     [take_slab; close_slab, and at once in a closed slab]
//   absent    -> free       [reopen_slab]
// Freeing a pinned page, or any arrow not drawn, is the caller's bug and ends the process.
//
// Each call is O(1) (those on a slab: O(its pages)), and a page costs 12 bytes here, 20 in a
// durable pool. A page is taken from the lowest slab that has a free one, so that high slabs empty
// first. A closed slab is being emptied: no page is taken from it, and a page that is freed in it
// is gone (absent) until the slab is reopened. Not thread-safe: the index holds its lock.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <set>
#include <vector>

namespace kvc2 {

using PoolId = uint32_t;
using PageId = uint32_t;
using NodeId = uint32_t;

constexpr PageId kNoPage = 0xFFFFFFFF;
constexpr uint32_t kNoSlab = 0xFFFFFFFF;

// One number for a page of any pool.
constexpr uint64_t name_of(PoolId pool, PageId page) { return uint64_t{pool} << 32 | page; }

enum class PageState : uint8_t { kAbsent, kFree, kPrivate, kInFlight, kResident };

struct Page {
  // Of a block's page (in_flight, resident): the node that holds the block, and the block's
  // position on its path from the root. Of a free page: the next and the previous free page of its
  // slab.
  uint32_t node = kNoPage;
  uint32_t block = kNoPage;
  uint32_t pins : 23 = 0;      // leases and transfers that forbid its eviction (I4)
  uint32_t state : 4 = 0;      // PageState
  uint32_t held : 1 = 0;       // of a private page: an open lease's duplicate, or a move's target
  uint32_t queued : 1 = 0;     // is in `undemoted`
  uint32_t sent_back : 1 = 0;  // is in `sent_back`
  uint32_t refused : 1 = 0;    // the pool below would not have it (I14)
  uint32_t insisted : 1 = 0;   // no pool refuses it until it is in the last one of the chain
};

class PagePool {
 public:
  struct Shape {
    uint32_t page_size;
    uint32_t pages_per_slab;
    std::optional<PoolId> below;  // the next slower pool of its chain
    bool durable;
    uint8_t tier = 0;            // pools of one tier share a tenant's quota
    uint64_t page_bytes = 1;     // as quotas count
    bool second_access = false;  // takes only blocks that an acquire has matched
  };
  struct Counts {
    uint32_t slabs = 0, pages = 0, free = 0, private_ = 0, in_flight = 0, resident = 0, pinned = 0;
    uint64_t evicted = 0, last_copies = 0;  // since it was made; faults do not count
    uint64_t refused = 0;  // blocks that it did not take, each time that it did not
  };

  explicit PagePool(const Shape& of) : shape(of) {}

  uint32_t add_slab();              // its number: the lowest free one
  bool take_slab(uint32_t slab);    // false unless it is there and all its pages are free or gone
  bool close_slab(uint32_t slab);   // false unless it is open and no page is private or pinned
  bool reopen_slab(uint32_t slab);  // false unless it is closed
  bool is_closed(uint32_t slab) const;
  // By slab: pages that are not free; kNoSlab where there is no slab, or a closed one.
  std::vector<uint32_t> slab_pages() const;

  std::optional<PageId> allocate(PageState to);
  void take(PageId page, PageState to);  // this free page
  void move(PageId page, PageState to);  // private or in_flight -> resident
  void free(PageId page);
  void pin(PageId page);
  void unpin(PageId page);
  void count_eviction(bool last_copy);
  void count_refusals(uint64_t blocks) { counts_.refused += blocks; }
  // To be demoted: once, and only where there is a pool below.
  void enqueue(PageId page);
  void send_back(PageId page);              // to be demoted again, after all that is new
  void dequeue(std::deque<PageId>& queue);  // the first of `undemoted` or of `sent_back`
  size_t waiting() const;                   // pages in either
  // It waits in a queue, was refused, or is still coming.
  bool on_its_way_down(PageId page) const;

  bool valid(PageId page) const { return page < pages_.size(); }
  PageState state(PageId page) const { return static_cast<PageState>(pages_[page].state); }
  bool is(PageId page, PageState state) const { return valid(page) && this->state(page) == state; }
  Page& operator[](PageId page) { return pages_[page]; }
  const Page& operator[](PageId page) const { return pages_[page]; }
  uint32_t size() const { return static_cast<uint32_t>(pages_.size()); }  // absent ones included
  void prefetch(PageId page) const {
    if (valid(page)) __builtin_prefetch(&pages_[page], 1);
  }
  const Counts& counts() const { return counts_; }
  size_t metadata_bytes() const;

  void check(PoolId self) const;  // I5

  const Shape shape;
  bool leaving = false;               // it is being removed: no call knows it any more
  bool closed = false;                // its session ended: nothing is planned into it again
  std::vector<uint64_t> generations;  // by page; of a durable pool only
  // Pages whose demotion is still to be considered, oldest first; one may have been freed since it
  // was queued. `sent_back`: the pool below evicted the block before the next pool below had it.
  std::deque<PageId> undemoted, sent_back;

 private:
  struct Slab {
    bool present = false;
    bool closed = false;
    uint32_t free = 0;
    uint32_t gone = 0;  // absent pages of a closed slab
    PageId first_free = kNoPage;
  };

  uint32_t& count(PageState state);
  Slab& slab_of(PageId page) { return slabs_[page / shape.pages_per_slab]; }
  void set_state(PageId page, PageState to);
  void set_absent(PageId page);
  void link(PageId page);
  void unlink(PageId page);

  std::vector<Page> pages_;
  std::vector<Slab> slabs_;
  std::set<uint32_t> slabs_with_free_;
  Counts counts_;
  size_t in_both_ = 0;  // pages in both queues
};

}  // namespace kvc2
