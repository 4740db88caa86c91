// The blocks of all namespaces as compressed radix trees, and where each block has pages.
//
// A node holds a run of blocks that nothing has branched from. A commit that branches splits it;
// the part after the branch keeps the node's id, so only the pages before it change their owner:
//
//     before                            after: block 2' joins beside 2
//     root ── n7 [0 1 2 3] ── n9 [4]    root ── n8 [0 1] ┬─ n7 [2 3] ── n9 [4]
//                                                        └─ n5 [2']
//
// When the branch is gone, the next acquire of the path makes the two parts one run again (`join`).
// An eviction does not join them, since its callers hold places of nodes meanwhile.
//
// Per node and pool, a Residency counts the node's pages of that pool, and how many children have
// such pages in their subtrees: whether a page is a leaf of its pool is one look. The counts of the
// nodes above change only when a subtree gains its first page of a pool, or loses its last one.
//
// Laws of index.h that are kept here: I1, I2 (`trim`: a run never ends in a hole), I3 (`rank_of`
// ranks only what may go).
// Only the first block of a node may have extras (I13): an image begins a node, which is joined to
// none above. The tree's side table has its digest, so that a block without extras pays nothing.
//
// A root may have millions of children (opaque keys): a child is found by its key in a hash table,
// and only what walks the whole namespace goes from sibling to sibling.
//
// Costs: finding compares tokens, and hashes once an edge. A block costs 20 bytes here beside its
// tokens, 4 for each pool that holds it, 32 once a digest names it; a node costs about 200 bytes.
// Why this shape: at ten million blocks, a look at memory takes 0.1 us, and the number of looks
// decides. A node has what a match needs (tokens, how many pages are there) in a few arrays, and a
// match never looks at a page: a path of 80 nodes takes some hundred looks, where a node for each
// block would take ten thousand. `python -m benchmarks.index_ops` prints the costs.
// Not thread-safe: the index holds its lock. Knows no lease and no transfer: they are pins to it.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <vector>

#include "index/block_key.h"
#include "index/eviction/policy.h"
#include "index/key_table.h"
#include "index/kv_events.h"
#include "index/life.h"
#include "index/pools.h"
#include "index/prefix_pins.h"
#include "index/quotas.h"

namespace kvc2 {

constexpr NodeId kNoNode = 0xFFFFFFFF;
constexpr uint32_t kBeforeFirst = 0xFFFFFFFF;  // + 1 == 0
constexpr uint32_t kNoneFresh = 0xFFFFFFFF;    // of `say`: no block of the path is new

// A block: the offset-th of a node's run. {root, kBeforeFirst} is where a path begins.
struct Place {
  NodeId node;
  uint32_t offset;

  bool operator==(const Place&) const = default;
};

// Consecutive blocks of one node.
struct Run {
  NodeId node;
  uint32_t offset;
  uint32_t blocks;
};

struct Space {  // a namespace
  Digest name;
  uint32_t page_size;
  NodeId root;
  uint32_t words = 0;       // of what names a block: page_size tokens, or a KeyBlock
  bool opaque = false;      // its blocks are named by keys: each hangs on the root, and none on it
  bool retired = false;     // its blocks are dead (I8)
  uint32_t retired_at = 0;  // a second of the caller's clock
  TenantId tenant = 0;
  bool closed = false;  // no namespace has this number now
};

struct Residency {  // one pool's pages in one node
  PoolId pool;
  uint32_t count = 0;         // pages that are there, resident or in flight
  uint32_t arriving = 0;      // of those, pages in flight
  uint32_t children = 0;      // whose subtrees have pages of this pool
  std::vector<PageId> pages;  // by offset; ends with the last one there
  Rank rank = kNotEvictable;  // of the last page, in the pool's order

  bool any() const { return count + children > 0; }
};

struct Node {
  NodeId parent = kNoNode, first_child = kNoNode, next = kNoNode, previous = kNoNode;  // siblings
  uint32_t space = 0;
  uint32_t first = 0;          // position of its first block on the path
  uint32_t reused_blocks = 0;  // leading ones that an acquire has matched
  bool live = false;
  bool has_extras = false;  // its first block has
  std::vector<uint32_t> tokens;
  std::vector<BlockKey> keys;
  std::vector<Use> uses;        // by block
  std::vector<Digest> digests;  // of the leading blocks that have been named
  std::vector<Residency> pools;

  uint32_t blocks() const { return static_cast<uint32_t>(keys.size()); }
};

class RadixTree {
 public:
  RadixTree(Pools& pools, EvictionPolicy& policy, size_t kv_event_bytes = 0)
      : events(kv_event_bytes), pools_(pools), policy_(policy) {}

  // Structure.
  // Its number: a closed one's, or new.
  uint32_t add_space(const Digest& name, uint32_t page_size, bool opaque = false);
  bool close_space(uint32_t space);  // false: it has blocks
  size_t open_spaces() const { return spaces.size() - free_spaces_.size(); }
  uint32_t retire(uint32_t space);                                // the blocks in it
  std::vector<Run> find(uint32_t space, Content content) const;   // leading blocks, holes included
  std::optional<Place> next(Place at, const Block& block) const;  // the one after `at`, if there
  std::optional<Place> next(Place at, const BlockKey& key) const;
  // Find or add; none: a collision, which is counted. A block that a restart found on disk teaches
  // the policy nothing.
  std::optional<Place> insert(Place at, const Block& block, uint32_t stamp, bool restored = false);
  bool last(Place at) const;  // nothing hangs on it
  // To a node without children, blocks without extras.
  Run append(NodeId node, Tokens tokens, uint32_t stamp);
  std::vector<Run> join(std::span<const Run> path);  // the path, in fewer nodes where that is cheap
  void trim(NodeId node);  // drop trailing blocks without a page, and nodes that this empties
  std::optional<Place> parent(Place at) const;  // none before the first block

  // Residency (residency.cpp). Pages are placed and cleared here; their states are the pool's.
  PageId page(Place at, PoolId pool) const;  // resident or in flight; else kNoPage
  bool resident(Place at, PoolId pool) const;
  std::span<const PageId> pages(const Run& run, PoolId pool) const;  // may end before the run
  uint32_t resident_blocks(const Run& run, PoolId pool) const;       // leading ones
  // The pool has a page of each block. After a fault it may say no though the pool has them.
  bool holds_all(const Run& run, PoolId pool) const;
  bool anywhere(Place at) const;  // present in any pool
  bool resident_elsewhere(Place at, PoolId pool) const;
  // The pool evicts it before all blocks of which it and faster pools have the only copies.
  bool spent(Place at, PoolId pool) const;
  bool resident_below(Place at, PoolId pool) const;  // in a slower pool of its chain
  // Nothing more is copied down from there: a slower pool has it, or the next one refused it.
  bool settled(Place at, PoolId pool) const;
  void place(Place at, PoolId pool, PageId page);  // the caller refreshes the node
  void place(const Run& run, PoolId pool, std::span<const PageId> pages);
  void arrive(Place at, PoolId pool);                // its page has become resident
  PageId clear(Place at, PoolId pool);               // the caller trims the node
  void replace(Place at, PoolId pool, PageId page);  // the block's page by another one
  Place owner(PoolId pool, PageId page) const;

  // Recency and eviction (residency.cpp).
  void touch(const Run& run, uint32_t stamp);  // a use by the acquire of this stamp
  void mark_reused(const Run& run);          // an acquire has matched it, and all blocks before it
  bool reused(Place at) const;               // since it came into the tree; so were all before it
  bool admits(PoolId pool, Place at) const;  // a second_access pool takes only reused blocks
  void refresh(NodeId node);                 // after a change of pins, stamps or residency in it
  Rank rank_of(NodeId node, const Residency& in) const;
  uint8_t standing_of(Place at, PoolId pool) const;  // of a page that may go
  // The standing that a page of such a block would have in a pool.
  uint8_t standing_in(PoolId pool, const BlockKey& key, const Life& life, bool held_below) const;
  // An acquire asked for the blocks with these keys below one with the use `above` (null: first of
  // their path), and found none of them: the mark of each, as the policy says.
  std::vector<uint32_t> asked(const Use* above, std::span<const BlockKey> keys, uint32_t stamp);
  void expect(Place at, uint32_t mark);  // a block that it asked for, and that was just added
  bool dead(Place at) const;             // it matches no request any more (I8)
  uint32_t living_blocks(const Run& run) const;  // those before the first that has expired
  std::optional<Place> coldest(PoolId pool);     // the next victim, as the policy chooses
  std::optional<Place> coldest_of(TenantId tenant, PoolId pool);  // among blocks of the tenant
  void set_tenant(uint32_t space, TenantId tenant);               // walks the namespace
  void forget_tenants(PoolId pool);                               // it has no pages any more
  std::optional<Place> oldest(PoolId pool) const;  // the longest unused of the first standing
  // The block of the node's last page there, if that page may go.
  std::optional<Place> evictable(NodeId node, PoolId pool) const;
  void halve_stamps();

  // Lives (lives_of_nodes.cpp).
  Life life(Place at) const;
  // A request says this of every block on the path to `at`. From position `fresh` on the blocks are
  // new and live just so; before it, `said` is merged with what is known.
  void say(Place at, const Life& said, uint32_t fresh);
  // Marks the end of the path to `at` as ended: the blocks that the acquire of this stamp was the
  // last to use, and from which no other path branches.
  void end_tail(Place at, uint32_t stamp);
  void expire_by(uint32_t space, uint32_t second);  // all blocks of a namespace; walks it
  // In how many nodes blocks expired, lapsed, or are pinned no more.
  uint32_t advance(uint32_t now);
  uint32_t now() const { return now_; }

  // Telling (telling.cpp). What comes and goes is told by `place`, `arrive`, `replace`, `clear`.
  bool tell_some(uint32_t pages);  // a scan goes on, over so many pages at most; false: it is over

  // Identity.
  const Digest& digest(Place at);         // makes the digests that are missing on its path
  const Digest& parent_digest(Place at);  // of a first block: the name of the namespace
  Tokens tokens(Place at) const;
  Block block(Place at) const;  // good until the tree changes
  bool is(Place at, const Block& block) const;

  const Node& operator[](NodeId node) const { return nodes_[node]; }
  void check() const;
  NodeId node_ids() const { return static_cast<NodeId>(nodes_.size()); }
  size_t metadata_bytes(NodeId begin, NodeId end) const;  // of these nodes
  size_t table_bytes() const;                             // of all that is in no node

  std::vector<Space> spaces;
  PrefixPins pins;  // the caller refreshes the nodes
  Quotas quotas;    // a tenant's first quota is set before the tenant has blocks
  KvEventQueue events;
  uint32_t live_nodes = 0;
  uint32_t blocks = 0;  // holes included
  uint32_t holes = 0;
  uint64_t collisions = 0;  // blocks that `insert` has refused

 private:
  NodeId new_node();
  Tokens tokens_at(const Node& node, uint32_t offset) const;
  bool collides(Place at, const BlockKey& key) const;
  const Digest* extras_of(NodeId node) const;
  void give_extras(NodeId from, NodeId to);
  NodeId child(NodeId node, const BlockKey& key, const Block& block) const;
  NodeId split(NodeId node, uint32_t at);
  void split_residency(Node& head, NodeId head_id, Node& tail, uint32_t at);
  bool may_join(NodeId above, NodeId node) const;
  void join(NodeId above, NodeId node);
  void join_residency(NodeId above, NodeId node);
  void forget_node(NodeId id);
  void adopt_child(NodeId parent, NodeId child);
  void orphan_child(NodeId child);
  Run append(NodeId node, std::span<const BlockKey> keys, Tokens tokens, uint32_t stamp,
             bool restored);
  void remove_tail(Node& node);
  static Residency* find_residency(Node& node, PoolId pool);
  static const Residency* find_residency(const Node& node, PoolId pool);
  Residency& residency(Node& node, PoolId pool) const;
  void drop_residency(NodeId node, PoolId pool);
  void propagate(NodeId node, PoolId pool, int change);
  void forget_refusals(const Run& run, PoolId pool);
  void set_rank(NodeId node, Residency& in, Rank rank);
  void tell_marked(Place at, const Use& before);
  EvictionOrder& order(PoolId pool);
  std::optional<Place> coldest(PoolId pool, const EvictionOrder& order);
  KvBlock told_as(Place at) const;
  bool elsewhere_in_tier(Place at, PoolId pool) const;
  void tell_stored(Place at, PoolId pool);
  void tell_removed(Place at, PoolId pool);
  bool tell_path(Place to, PoolId pool);
  Quota* quota(NodeId node, PoolId pool);  // that its blocks' pages of the pool count in
  void count_pages(NodeId node, PoolId pool, int64_t pages);
  template <typename Change>
  void change_lives(NodeId id, uint32_t from, uint32_t to, Change change);
  void set_lives(NodeId id, std::vector<LifeRun>&& runs);
  void split_lives(NodeId head, NodeId tail, uint32_t at);
  void join_lives(NodeId above, NodeId node);
  void trim_lives(NodeId id);
  uint32_t next_expiry(std::span<const LifeRun> runs) const;
  void check_lives(NodeId id) const;
  void check_node(NodeId id) const;
  void check_quotas() const;
  void check_counts() const;
  void check_residency(NodeId id, const Residency& in) const;
  void check_evictable(NodeId id, const Residency& in) const;

  Pools& pools_;
  EvictionPolicy& policy_;
  std::deque<Node> nodes_;  // a deque never moves what it holds
  std::vector<NodeId> free_nodes_;
  std::vector<uint32_t> free_spaces_;
  KeyTable heads_;                             // nodes by the key of their first block
  std::unordered_map<NodeId, Digest> extras_;  // of the nodes that have some
  std::vector<EvictionOrder> orders_;          // by pool
  std::map<std::pair<PoolId, TenantId>, EvictionOrder> tenant_orders_;  // of those with a quota
  struct NodeLives {
    std::vector<LifeRun> runs;  // what follows the last one lives as Life{}
    uint32_t due = 0;           // the next second in which one expires or lapses; 0: none
  };
  std::unordered_map<NodeId, NodeLives> lives_;  // of the nodes with other lives than Life{}
  std::set<std::pair<uint32_t, NodeId>> due_;
  uint32_t now_ = 0;
};

}  // namespace kvc2
