// The proofs of I1-I7: everything that is maintained step by step is counted again from scratch.
// O(everything): for tests, and for `kvc2` when it is asked to.
#include "base/check.h"

#include <algorithm>

#include "index/index.h"

namespace kvc2 {

void RadixTree::check_residency(NodeId id, const Residency& in) const {
  const Node& node = nodes_[id];
  KVC2_CHECK(in.any(), "node %u keeps an empty residency of pool %u", id, in.pool);
  KVC2_CHECK(pools_[in.pool] != nullptr, "node %u has pages of pool %u, removed", id, in.pool);
  KVC2_CHECK(in.pages.size() <= node.blocks(), "node %u pool %u", id, in.pool);
  KVC2_CHECK(in.pages.empty() || in.pages.back() != kNoPage, "node %u pool %u", id, in.pool);
  uint32_t count = 0, arriving = 0;
  for (uint32_t i = 0; i < in.pages.size(); ++i) {
    if (in.pages[i] == kNoPage) continue;
    ++count;
    arriving += pools_[in.pool]->state(in.pages[i]) == PageState::kInFlight;
    const Page& page = (*pools_[in.pool])[in.pages[i]];
    KVC2_CHECK(pools_[in.pool]->state(in.pages[i]) >= PageState::kInFlight && page.node == id &&
                   page.block == node.first + i,
               "I6: pool %u page %u of node %u is owned by node %u", in.pool, in.pages[i], id,
               page.node);
  }
  uint32_t children = 0;
  for (NodeId child = node.first_child; child != kNoNode; child = nodes_[child].next) {
    children += find_residency(nodes_[child], in.pool) != nullptr;
  }
  KVC2_CHECK(count == in.count && children == in.children,
             "node %u pool %u: %u pages, %u children with some; counted %u and %u", id, in.pool,
             in.count, in.children, count, children);
  KVC2_CHECK(arriving == in.arriving, "node %u pool %u: %u of %u in flight", id, in.pool,
             in.arriving, arriving);
  KVC2_CHECK(in.rank == rank_of(id, in), "I3: node %u pool %u has a stale rank", id, in.pool);
  KVC2_CHECK(in.rank == kNotEvictable || orders_[in.pool].holds({in.rank, id}),
             "I3: node %u is not in the order of pool %u", id, in.pool);
}

void RadixTree::check_node(NodeId id) const {
  const Node& node = nodes_[id];
  const Space& space = spaces[node.space];
  KVC2_CHECK(node.tokens.size() == size_t{node.blocks()} * space.page_size &&
                 node.uses.size() == node.blocks() && node.digests.size() <= node.blocks(),
             "I1: node %u has %u keys", id, node.blocks());
  KVC2_CHECK(node.again <= node.blocks(), "node %u: %u blocks used again", id, node.again);
  for (NodeId child = node.first_child; child != kNoNode; child = nodes_[child].next) {
    KVC2_CHECK(nodes_[child].again == 0 || node.again == node.blocks(),
               "node %u was used again, not all of node %u", child, id);
    KVC2_CHECK(nodes_[child].live && nodes_[child].parent == id &&
                   nodes_[child].space == node.space &&
                   nodes_[child].first == node.first + node.blocks(),
               "I1: node %u is no child of node %u", child, id);
  }
  check_lives(id);
  for (const Residency& in : node.pools) {
    check_residency(id, in);
    KVC2_CHECK(pools_[in.pool]->shape.page_size == space.page_size, "node %u pool %u", id, in.pool);
  }
  if (node.parent == kNoNode) {
    KVC2_CHECK(node.blocks() == 0 && space.root == id, "I1: node %u is no root", id);
    return;
  }
  KVC2_CHECK(node.blocks() > 0, "I1: node %u is empty", id);
  KVC2_CHECK(heads_.get(node.keys[0]) == id, "I1: node %u is not found", id);
  const Node& above = nodes_[node.parent];
  BlockKey key = above.keys.empty() ? root_key(space.name) : above.keys.back();
  for (uint32_t i = 0; i < node.blocks(); ++i) {
    key = next_key(key, tokens_at(node, i));
    KVC2_CHECK(key == node.keys[i], "I1: the key of block %u of node %u", i, id);
  }
  Digest digest = above.digests.empty() ? space.name : above.digests.back();
  for (uint32_t i = 0; i < node.digests.size(); ++i) {
    digest = next_digest(digest, tokens_at(node, i));
    KVC2_CHECK(digest == node.digests[i], "the digest of block %u of node %u", i, id);
  }
  KVC2_CHECK(node.first_child != kNoNode || anywhere({id, node.blocks() - 1}),
             "I2: node %u ends in a hole", id);
}

// I11: what is counted is there, and what may go is in its tenant's order.
void RadixTree::check_quotas() const {
  std::map<std::pair<uint8_t, TenantId>, Quota> found;
  size_t ranked = 0, ordered = 0;
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    const TenantId tenant = node.live ? spaces[node.space].tenant : 0;
    for (const Residency& in : node.pools) {
      const PagePool::Shape& shape = pools_[in.pool]->shape;
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
      KVC2_CHECK(held == there, "pool %u has %u pages in queue %u, the policy was told of %u", pool,
                 there, queue, held);
    }
  }
}

void RadixTree::check() const {
  heads_.check();
  uint32_t live = 0, all = 0, empty = 0;
  size_t ranked = 0, ordered = 0;
  std::vector<uint32_t> present(pools_.size(), 0);
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (!node.live) continue;
    check_node(id);
    ++live;
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
             "%u nodes, %u blocks, %u holes; counted %u, %u, %u", live_nodes, blocks, holes, live,
             all, empty);
  KVC2_CHECK(live == heads_.size() + open_spaces(), "I1: %zu heads of %u nodes", heads_.size(),
             live);
  KVC2_CHECK(ranked == ordered, "I3: %zu of %zu in the orders are there", ranked, ordered);
  for (PoolId pool = 0; pool < pools_.size(); ++pool) {
    if (!pools_[pool] || pools_[pool]->leaving) continue;
    const PagePool::Counts& counts = pools_[pool]->counts();
    KVC2_CHECK(counts.resident + counts.in_flight == present[pool],
               "I6: pool %u has %u resident and %u in flight, the tree %u", pool, counts.resident,
               counts.in_flight, present[pool]);
  }
}

// I4: the pins are those of the leases and the transfers, and so are in-flight and held pages.
void Index::check_pins() const {
  struct Expected {
    uint32_t pins = 0, held = 0, arriving = 0;
  };
  std::unordered_map<uint64_t, Expected> expected;
  const auto at = [&](PoolId pool, PageId page) -> Expected& {
    return expected[uint64_t{pool} << 32 | page];
  };
  for (const auto& [id, lease] : leases_) {
    for (const auto* list : {&lease.held, &lease.stray}) {
      for (const Held& held : *list) {
        if (held.anchor != kNoPage) ++at(lease.pool, held.anchor).pins;
        if (held.page != held.anchor) ++at(lease.pool, held.page).held;
      }
    }
  }
  for (const auto& [id, transfer] : transfers_) {
    for (size_t i = 0; i < transfer.source_pages.size(); ++i) {
      if (alive(transfer.source)) ++at(transfer.source, transfer.source_pages[i]).pins;
      if (!alive(transfer.target)) continue;
      if (transfer.is_move()) {
        ++at(transfer.target, transfer.target_pages[i]).held;
        continue;
      }
      ++at(transfer.target, transfer.target_pages[i]).pins;
      ++at(transfer.target, transfer.target_pages[i]).arriving;
      KVC2_CHECK(in_flight_.at(uint64_t{transfer.target} << 32 | transfer.target_pages[i]) == id,
                 "pool %u page %u", transfer.target, transfer.target_pages[i]);
    }
  }
  size_t arriving = 0;
  for (PoolId id = 0; id < pools_.size(); ++id) {
    for (PageId page = 0; alive(id) && page < pools_[id]->size(); ++page) {
      const Expected want = at(id, page);
      const Page& info = (*pools_[id])[page];
      const bool in_flight = pools_[id]->state(page) == PageState::kInFlight;
      KVC2_CHECK(
          info.pins == want.pins && info.held == want.held && in_flight == want.arriving,
          "I4: pool %u page %u: %u pins, held %u, in flight %d; leases and transfers say %u, "
          "%u, %u",
          id, page, info.pins, info.held, in_flight, want.pins, want.held, want.arriving);
      arriving += in_flight;
    }
  }
  KVC2_CHECK(arriving == in_flight_.size(), "%zu of %zu in flight", arriving, in_flight_.size());
}

void Index::check_computing() const {
  std::unordered_map<BlockKey, uint32_t, NameHash> expected;
  for (const auto& [id, lease] : leases_) {
    for (size_t i = lease.computing_from; i < lease.unmatched.size(); ++i) {
      ++expected[lease.unmatched[i]];
    }
  }
  computing_.check();
  const bool same = std::ranges::all_of(
      expected, [&](const auto& each) { return computing_.get(each.first) == each.second; });
  KVC2_CHECK(same && expected.size() == computing_.size(),
             "%zu blocks are computed by leases, %zu are registered", expected.size(),
             computing_.size());
}

void Index::check() const {
  const Lock lock(mutex_);
  for (PoolId id = 0; id < pools_.size(); ++id) {
    if (!alive(id)) continue;
    pools_[id]->check(id);
    const PagePool& of = *pools_[id];
    size_t queued = 0, sent_back = 0, waiting = 0;
    for (PageId page = 0; page < of.size(); ++page) {
      queued += of[page].queued;
      sent_back += of[page].sent_back;
      waiting += of[page].queued || of[page].sent_back;
    }
    KVC2_CHECK(queued == of.undemoted.size() && sent_back == of.sent_back.size() &&
                   waiting == of.waiting(),
               "pool %u queues %zu and %zu pages", id, queued, sent_back);
  }
  tree_.check();
  tree_.pins.check();
  check_pins();
  check_computing();
  curve_.check();
  obituaries_.check();
}

}  // namespace kvc2
