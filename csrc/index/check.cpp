// The proofs of the laws I1-I14 (index.h), L1-L4 (leases.h) and T1-T3 (transfers.h), each named by
// its number where it is broken: what is maintained step by step is counted again from scratch.
// O(everything): for tests, and for `kvc2` when it is asked to.
#include "base/check.h"

#include <algorithm>
#include <map>

#include "index/index.h"

namespace kvc2 {

void PagePool::check(PoolId self) const {
  Counts seen;
  std::vector<uint32_t> gone(slabs_.size(), 0);
  for (PageId page = 0; page < pages_.size(); ++page) {
    const PageState state = this->state(page);
    const Slab& slab = slabs_[page / shape.pages_per_slab];
    gone[page / shape.pages_per_slab] += slab.closed && state == PageState::kAbsent;
    KVC2_CHECK(slab.closed ? slab.present && state != PageState::kFree
                           : (state != PageState::kAbsent) == slab.present,
               "I5: pool %u page %u: state %d", self, page, int(state));
    seen.pages += state != PageState::kAbsent;
    seen.free += state == PageState::kFree;
    seen.private_ += state == PageState::kPrivate;
    seen.in_flight += state == PageState::kInFlight;
    seen.resident += state == PageState::kResident;
    seen.pinned += pages_[page].pins > 0;
    KVC2_CHECK(!pages_[page].held || state == PageState::kPrivate,
               "I6: pool %u page %u is held, not private", self, page);
    KVC2_CHECK((!pages_[page].refused && !pages_[page].insisted) || state >= PageState::kInFlight,
               "I14: pool %u page %u is refused or insisted on without a block", self, page);
    KVC2_CHECK(!pages_[page].pins || state >= PageState::kInFlight,
               "I4: pool %u page %u is pinned without a block", self, page);
  }
  const Counts& c = counts_;
  KVC2_CHECK(seen.free == c.free && seen.private_ == c.private_ && seen.in_flight == c.in_flight &&
                 seen.resident == c.resident && seen.pages == c.pages && seen.pinned == c.pinned,
             "I5: pool %u counts free %u private %u in flight %u resident %u pinned %u", self,
             c.free, c.private_, c.in_flight, c.resident, c.pinned);
  uint32_t left = 0;
  for (uint32_t slab = 0; slab < slabs_.size(); ++slab) {
    KVC2_CHECK(slabs_[slab].gone == gone[slab], "I5: pool %u slab %u: %u gone", self, slab,
               gone[slab]);
    left += gone[slab];
  }
  KVC2_CHECK(
      c.free + c.private_ + c.in_flight + c.resident + left == c.slabs * shape.pages_per_slab,
      "I5: pool %u of %u slabs", self, c.slabs);
}

void PrefixPins::check() const {
  size_t ends = 0;
  for (PoolId pool = 0; pool < pools_.size(); ++pool) {
    const OfPool& of = pools_[pool];
    OfPool counted;
    for (const auto& [last, pin] : of.pins) {
      KVC2_CHECK(!pin.keys.empty() && pin.keys.back() == last, "I10: a pin has another name");
      KVC2_CHECK(pin.ends == 0 || ends_.contains({pin.ends, pool, last}), "I10: a pin for ever");
      ends += pin.ends > 0;
      count(counted, pin);
    }
    KVC2_CHECK(counted.soft == of.soft && counted.hard == of.hard &&
                   counted.blocks.size() == of.blocks.size() &&
                   counted.spaces.size() == of.spaces.size(),
               "I10: %u soft and %u hard blocks of pins, counted %u and %u", counted.soft,
               counted.hard, of.soft, of.hard);
    for (const auto& [key, counts] : counted.blocks) {
      const auto found = of.blocks.find(key);
      KVC2_CHECK(found != of.blocks.end() && found->second.soft == counts.soft &&
                     found->second.hard == counts.hard,
                 "I10: the pins of a block");
    }
    for (const auto& [space, counts] : counted.spaces) {
      const auto found = of.spaces.find(space);
      KVC2_CHECK(found != of.spaces.end() && found->second.soft == counts.soft &&
                     found->second.hard == counts.hard,
                 "I10: the pinned blocks of namespace %u", space);
    }
  }
  KVC2_CHECK(ends == ends_.size(), "I10: %zu ends of %zu pins", ends_.size(), ends);
}

void RadixTree::check_residency(NodeId id, const Residency& in) const {
  const Node& node = nodes_[id];
  KVC2_CHECK(in.any(), "I3: node %u keeps an empty residency of pool %u", id, in.pool);
  KVC2_CHECK(pools_.present(in.pool), "I6: node %u has pages of pool %u, removed", id, in.pool);
  KVC2_CHECK(in.pages.size() <= node.blocks(), "I6: node %u has pages of pool %u for no block", id,
             in.pool);
  KVC2_CHECK(in.pages.empty() || in.pages.back() != kNoPage,
             "I3: the pages of pool %u in node %u end with none", in.pool, id);
  uint32_t count = 0, arriving = 0;
  for (uint32_t i = 0; i < in.pages.size(); ++i) {
    if (in.pages[i] == kNoPage) continue;
    ++count;
    arriving += pools_[in.pool].state(in.pages[i]) == PageState::kInFlight;
    const Page& page = pools_[in.pool][in.pages[i]];
    const auto below = pools_[in.pool].shape.below;
    KVC2_CHECK(!page.refused || (below && this->page({id, i}, *below) == kNoPage),
               "I14: pool %u refused block %u of node %u, and has it", below.value_or(0), i, id);
    KVC2_CHECK(pools_[in.pool].state(in.pages[i]) >= PageState::kInFlight && page.node == id &&
                   page.block == node.first + i,
               "I6: pool %u page %u of node %u is owned by node %u", in.pool, in.pages[i], id,
               page.node);
  }
  uint32_t children = 0;
  for (NodeId child = node.first_child; child != kNoNode; child = nodes_[child].next) {
    children += find_residency(nodes_[child], in.pool) != nullptr;
  }
  KVC2_CHECK(count == in.count && children == in.children,
             "I3: node %u pool %u: %u pages, %u children with some; counted %u and %u", id, in.pool,
             in.count, in.children, count, children);
  KVC2_CHECK(arriving == in.arriving, "I7: node %u pool %u: %u of %u in flight", id, in.pool,
             in.arriving, arriving);
  KVC2_CHECK(in.rank == rank_of(id, in), "I3: node %u pool %u has a stale rank", id, in.pool);
  KVC2_CHECK(in.rank == kNotEvictable || orders_[in.pool].holds({in.rank, id}),
             "I3: node %u is not in the order of pool %u", id, in.pool);
  if (in.rank != kNotEvictable) check_evictable(id, in);
}

// The last page of a residency may go: why, and before which others.
void RadixTree::check_evictable(NodeId id, const Residency& in) const {
  const Place at{id, static_cast<uint32_t>(in.pages.size()) - 1};
  const auto standing = static_cast<uint8_t>(in.rank >> 56);
  KVC2_CHECK(pools_[in.pool][in.pages.back()].pins == 0,
             "I4: pool %u may evict page %u, which is pinned", in.pool, in.pages.back());
  KVC2_CHECK(dead(at) == (standing <= rank_standing(kDead, false)),
             "I8: node %u goes from pool %u in standing %u", id, in.pool, standing);
  if (dead(at)) return;
  const Pinned pinned = pins.of(in.pool, nodes_[id].keys[at.offset]);
  KVC2_CHECK(pinned != Pinned::kHard, "I10: pool %u may evict from node %u what is pinned hard",
             in.pool, id);
  KVC2_CHECK((pinned == Pinned::kSoft) == (standing == rank_standing(kSoftPinned, false)),
             "I10: node %u goes from pool %u in standing %u", id, in.pool, standing);
}

void RadixTree::check_node(NodeId id) const {
  const Node& node = nodes_[id];
  const Space& space = spaces[node.space];
  KVC2_CHECK(node.tokens.size() == size_t{node.blocks()} * space.words &&
                 node.uses.size() == node.blocks() && node.digests.size() <= node.blocks(),
             "I1: node %u has %u keys", id, node.blocks());
  KVC2_CHECK(node.reused_blocks <= node.blocks(), "I12: node %u has %u reused blocks", id,
             node.reused_blocks);
  for (NodeId child = node.first_child; child != kNoNode; child = nodes_[child].next) {
    KVC2_CHECK(nodes_[child].reused_blocks == 0 || node.reused_blocks == node.blocks(),
               "I12: node %u was reused, not all of node %u", child, id);
    KVC2_CHECK(nodes_[child].live && nodes_[child].parent == id &&
                   nodes_[child].space == node.space &&
                   nodes_[child].first == node.first + node.blocks(),
               "I1: node %u is no child of node %u", child, id);
  }
  check_lives(id);
  for (const Residency& in : node.pools) {
    check_residency(id, in);
    KVC2_CHECK(pools_[in.pool].shape.page_size == space.page_size,
               "I6: node %u has pages of pool %u, of another size", id, in.pool);
  }
  if (node.parent == kNoNode) {
    KVC2_CHECK(node.blocks() == 0 && space.root == id, "I1: node %u is no root", id);
    return;
  }
  KVC2_CHECK(node.blocks() > 0, "I1: node %u is empty", id);
  KVC2_CHECK(!space.opaque || (node.parent == space.root && node.blocks() == 1),
             "I1: node %u hangs on a key, or has several", id);
  KVC2_CHECK(heads_.get(node.keys[0]) == id, "I1: node %u is not found", id);
  KVC2_CHECK(node.has_extras == extras_.contains(id) && !(space.opaque && node.has_extras),
             "I13: node %u has extras: %d", id, node.has_extras);
  const Node& above = nodes_[node.parent];
  BlockKey key = above.keys.empty() ? root_key(space.name) : above.keys.back();
  for (uint32_t i = 0; i < node.blocks(); ++i) {
    key = next_key(key, block({id, i}));
    KVC2_CHECK(key == node.keys[i], "I1: the key of block %u of node %u", i, id);
  }
  Digest digest = above.digests.empty() ? space.name : above.digests.back();
  for (uint32_t i = 0; i < node.digests.size(); ++i) {
    digest = next_digest(digest, block({id, i}));
    KVC2_CHECK(digest == node.digests[i], "I7: the digest of block %u of node %u", i, id);
  }
  KVC2_CHECK(node.first_child != kNoNode || anywhere({id, node.blocks() - 1}),
             "I2: node %u ends in a hole", id);
}

static uint64_t end_of(const Life& life) { return life.expires == 0 ? ~uint64_t{0} : life.expires; }

void RadixTree::check_lives(NodeId id) const {
  const Node& node = nodes_[id];
  const auto found = lives_.find(id);
  if (node.parent != kNoNode && nodes_[node.parent].parent != kNoNode) {
    const Life above = life({node.parent, nodes_[node.parent].blocks() - 1});
    KVC2_CHECK(end_of(above) >= end_of(life({id, 0})), "I9: node %u outlives what is above it", id);
  }
  uint32_t living = 0;
  while (living < node.blocks() && !life({id, living}).expired(now_)) ++living;
  KVC2_CHECK(living_blocks({id, 0, node.blocks()}) == living,
             "I8: %u blocks of node %u match, %u live", living_blocks({id, 0, node.blocks()}), id,
             living);
  if (found == lives_.end()) return;
  const std::vector<LifeRun>& runs = found->second.runs;
  KVC2_CHECK(node.live && !runs.empty() && runs.back().end <= node.blocks(), "I9: lives of node %u",
             id);
  for (uint32_t i = 0; i + 1 < node.blocks(); ++i) {
    KVC2_CHECK(end_of(life({id, i})) >= end_of(life({id, i + 1})),
               "I9: block %u of node %u expires before what is below it", i, id);
  }
  const uint32_t due = found->second.due;
  KVC2_CHECK(due == next_expiry(runs) && (due == 0 || due_.contains({due, id})),
             "I9: node %u is due at %u", id, due);
}

// I11: what is counted is there, and what may go is in its tenant's order.
void RadixTree::check_quotas() const {
  std::map<std::pair<uint8_t, TenantId>, Quota> found;
  size_t ranked = 0, ordered = 0;
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    const TenantId tenant = node.live ? spaces[node.space].tenant : 0;
    for (const Residency& in : node.pools) {
      const PagePool::Shape& shape = pools_[in.pool].shape;
      if (!quotas.find(tenant, shape.tier)) continue;
      found[{shape.tier, tenant}].blocks += in.count;
      found[{shape.tier, tenant}].bytes += in.count * shape.page_bytes;
      const bool evictable = in.rank != kNotEvictable;
      ranked += evictable;
      KVC2_CHECK(!evictable || tenant_orders_.at({in.pool, tenant}).holds({in.rank, id}),
                 "I11: node %u is not in the order of tenant %u", id, tenant);
    }
  }
  for (const auto& [at, order] : tenant_orders_) ordered += order.size();
  KVC2_CHECK(ranked == ordered, "I11: %zu of %zu in the tenants' orders", ranked, ordered);
  for (const auto& [at, quota] : quotas.all()) {
    KVC2_CHECK(quota.blocks == found[at].blocks && quota.bytes == found[at].bytes,
               "I11: tenant %u has %lu blocks in tier %u, counted %lu", at.second,
               static_cast<unsigned long>(found[at].blocks), at.first,
               static_cast<unsigned long>(quota.blocks));
  }
}

// A policy that counts pages by queue was told of each.
void RadixTree::check_counts() const {
  std::map<std::pair<PoolId, uint32_t>, uint32_t> found;
  for (const Node& node : nodes_) {
    for (const Residency& in : node.pools) {
      for (uint32_t i = 0; i < in.pages.size(); ++i) {
        if (in.pages[i] != kNoPage) ++found[{in.pool, policy_.queued(node.uses[i]).queue}];
      }
    }
  }
  for (PoolId pool = 0; pool < pools_.size(); ++pool) {
    for (uint32_t queue = 0; queue < policy_.queues(); ++queue) {
      const uint32_t held = policy_.held(pool, queue), there = found[{pool, queue}];
      KVC2_CHECK(held == there, "I3: pool %u has %u pages in queue %u, the policy was told of %u",
                 pool, there, queue, held);
    }
  }
}

void RadixTree::check() const {
  heads_.check();
  uint32_t live = 0, all = 0, empty = 0, with_extras = 0;
  size_t ranked = 0, ordered = 0;
  std::vector<uint32_t> present(pools_.size(), 0);
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (!node.live) continue;
    check_node(id);
    ++live;
    with_extras += node.has_extras;
    all += node.blocks();
    for (uint32_t i = 0; i < node.blocks(); ++i) empty += !anywhere({id, i});
    for (const Residency& in : node.pools) {
      ranked += in.rank != kNotEvictable;
      present[in.pool] += in.count;
    }
  }
  for (const EvictionOrder& order : orders_) ordered += order.size();
  check_quotas();
  if (policy_.counts_pages()) check_counts();
  KVC2_CHECK(live == live_nodes && all == blocks && empty == holes,
             "I2: %u nodes, %u blocks, %u holes; counted %u, %u, %u", live_nodes, blocks, holes,
             live, all, empty);
  KVC2_CHECK(live == heads_.size() + open_spaces(), "I1: %zu heads of %u nodes", heads_.size(),
             live);
  KVC2_CHECK(with_extras == extras_.size(), "I13: the extras of %zu nodes, %u have some",
             extras_.size(), with_extras);
  KVC2_CHECK(ranked == ordered, "I3: %zu of %zu in the orders are there", ranked, ordered);
  for (PoolId pool = 0; pool < pools_.size(); ++pool) {
    if (!pools_.alive(pool)) continue;
    const PagePool::Counts& counts = pools_[pool].counts();
    KVC2_CHECK(counts.resident + counts.in_flight == present[pool],
               "I6: pool %u has %u resident and %u in flight, the tree %u", pool, counts.resident,
               counts.in_flight, present[pool]);
  }
}

void Transfers::claim(Claims& claims) const {
  for (const auto& [id, open] : open_) {
    const Plan& plan = open.plan;
    for (size_t i = 0; i < plan.size(); ++i) {
      if (pools_.alive(plan.source)) ++claims.of(plan.source, plan.source_pages[i]).pins;
      if (!pools_.alive(plan.target)) continue;
      Claim& target = claims.of(plan.target, plan.target_pages[i]);
      ++(plan.is_move() ? target.held : target.pins);
      target.arriving += !plan.is_move();
    }
  }
}

// Two pages of one block, parents first.
void Transfers::check_pairs(TransferId id, const Plan& plan) const {
  for (size_t i = 0; i < plan.size(); ++i) {
    const PageId from = plan.source_pages[i], to = plan.target_pages[i];
    const auto number = static_cast<unsigned long>(id);
    KVC2_CHECK(!pools_.alive(plan.source) || pools_[plan.source].is(from, PageState::kResident),
               "T2: transfer %lu reads page %u, which has no block", number, from);
    if (plan.is_move() || !pools_.alive(plan.target)) continue;
    const Place at = tree_.owner(plan.target, to);
    const Place same = pools_.alive(plan.source) ? tree_.owner(plan.source, from) : at;
    KVC2_CHECK(same.node == at.node && same.offset == at.offset,
               "T2: transfer %lu copies pages %u -> %u of two blocks", number, from, to);
    const auto above = tree_.parent(at);
    const PageId before = above ? tree_.page(*above, plan.target) : kNoPage;
    const auto later = std::span(plan.target_pages).subspan(i);
    KVC2_CHECK(before == kNoPage || std::ranges::find(later, before) == later.end(),
               "T3: transfer %lu has page %u before its parent's", number, to);
  }
}

void Transfers::check() const {
  size_t filled = 0, arriving = 0;
  for (const auto& [id, open] : open_) {
    check_pairs(id, open.plan);
    if (open.plan.is_move() || !pools_.alive(open.plan.target)) continue;
    for (const PageId page : open.plan.target_pages) {
      const auto found = in_flight_.find(name_of(open.plan.target, page));
      KVC2_CHECK(found != in_flight_.end() && found->second == id,
                 "T1: pool %u page %u is not known to be in flight", open.plan.target, page);
      ++filled;
    }
  }
  for (PoolId id = 0; id < pools_.size(); ++id) {
    if (pools_.alive(id)) arriving += pools_[id].counts().in_flight;
  }
  KVC2_CHECK(filled == in_flight_.size() && filled == arriving,
             "T1: %zu pages are in flight, transfers fill %zu, %zu are known", arriving, filled,
             in_flight_.size());
}

void Leases::claim(Claims& claims) const {
  for (const auto& [id, lease] : leases_) {
    for (const auto* list : {&lease.held, &lease.stray}) {
      for (const Held& held : *list) {
        if (held.anchor != kNoPage) ++claims.of(lease.pool, held.anchor).pins;
        if (held.page != held.anchor) ++claims.of(lease.pool, held.page).held;
      }
    }
  }
}

void Leases::check_held(LeaseId id, const Lease& lease) const {
  const auto number = static_cast<unsigned long>(id);
  std::optional<Place> above;
  KVC2_CHECK(lease.first <= lease.matched, "L1: lease %lu skips %u blocks of %u", number,
             lease.first, lease.matched);
  for (size_t i = 0; i < lease.held.size(); ++i) {
    const PageId anchor = lease.held[i].anchor;
    const Place at = tree_.owner(lease.pool, anchor);
    const auto parent = tree_.parent(at);
    const bool joins =
        !above || (parent && parent->node == above->node && parent->offset == above->offset);
    KVC2_CHECK(joins && tree_[at.node].space == lease.space &&
                   tree_[at.node].first + at.offset == lease.first + i,
               "L1: lease %lu holds page %u as block %zu, after a gap", number, anchor,
               lease.first + i);
    above = at;
    const auto transfer = transfers_.into(lease.pool, anchor);
    KVC2_CHECK(!transfer || std::ranges::find(lease.depends, *transfer) != lease.depends.end(),
               "L2: lease %lu does not wait for page %u", number, anchor);
  }
}

void Leases::check() const {
  std::unordered_map<BlockKey, uint32_t, NameHash> expected;
  for (const auto& [id, lease] : leases_) {
    if (pools_.alive(lease.pool)) check_held(id, lease);
    for (size_t i = lease.computing_from; i < lease.unmatched.size(); ++i) {
      ++expected[lease.unmatched[i]];
    }
  }
  computing_.check();
  const bool same = std::ranges::all_of(
      expected, [&](const auto& each) { return computing_.get(each.first) == each.second; });
  KVC2_CHECK(same && expected.size() == computing_.size(),
             "L3: leases compute %zu blocks, %zu are registered", expected.size(),
             computing_.size());
}

void KeyLeases::claim(Claims& claims) const {
  for (const auto& [id, lease] : leases_) {
    for (const PageId page : lease.pages) {
      if (page != kNoPage) ++claims.of(lease.pool, page).pins;
    }
  }
}

void KeyLeases::check() const {
  for (const auto& [id, lease] : leases_) {
    for (size_t key = 0; key < lease.pages.size() && pools_.alive(lease.pool); ++key) {
      if (lease.pages[key] == kNoPage) continue;
      const Place at = tree_.owner(lease.pool, lease.pages[key]);
      KVC2_CHECK(tree_[at.node].space == lease.space &&
                     std::ranges::equal(tree_.tokens(at), lease.keys[key]),
                 "L4: lease %lu holds page %u, which is not that of its key %zu",
                 static_cast<unsigned long>(id), lease.pages[key], key);
    }
  }
}

// I4, I7: what the pools say of each page is what leases and transfers say.
void Index::check_claims() const {
  Claims claims;
  leases_.claim(claims);
  key_leases_.claim(claims);
  transfers_.claim(claims);
  for (PoolId id = 0; id < pools_.size(); ++id) {
    for (PageId page = 0; pools_.alive(id) && page < pools_[id].size(); ++page) {
      const Claim want = claims.of(id, page);
      const Page& info = pools_[id][page];
      const bool in_flight = pools_[id].state(page) == PageState::kInFlight;
      KVC2_CHECK(info.pins == want.pins,
                 "I4: pool %u page %u: %u pins, leases and transfers say %u", id, page, info.pins,
                 want.pins);
      KVC2_CHECK(info.held == want.held && in_flight == want.arriving,
                 "I7: pool %u page %u: held %u, in flight %d; leases and transfers say %u and %u",
                 id, page, info.held, in_flight, want.held, want.arriving);
    }
  }
}

void Index::check_queues(PoolId id) const {
  const PagePool& of = pools_[id];
  size_t queued = 0, sent_back = 0, waiting = 0;
  for (PageId page = 0; page < of.size(); ++page) {
    queued += of[page].queued;
    sent_back += of[page].sent_back;
    waiting += of[page].queued || of[page].sent_back;
  }
  KVC2_CHECK(
      queued == of.undemoted.size() && sent_back == of.sent_back.size() && waiting == of.waiting(),
      "I12: pool %u queues %zu and %zu pages", id, queued, sent_back);
}

void Index::check() const {
  const Lock lock(mutex_);
  for (PoolId id = 0; id < pools_.size(); ++id) {
    if (!pools_.alive(id)) continue;
    pools_[id].check(id);
    check_queues(id);
  }
  tree_.check();
  tree_.pins.check();
  transfers_.check();
  leases_.check();
  key_leases_.check();
  check_claims();
  curve_.check();
  evictor_.obituaries().check();
}

}  // namespace kvc2
