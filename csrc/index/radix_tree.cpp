// Structure: finding, inserting, splitting, trimming, naming. What lies where: residency.cpp.
#include "index/radix_tree.h"

#include <algorithm>

#include "base/check.h"

namespace kvc2 {

uint32_t RadixTree::add_space(const Digest& name, uint32_t page_size, bool opaque) {
  if (free_spaces_.empty()) {
    free_spaces_.push_back(static_cast<uint32_t>(spaces.size()));
    spaces.emplace_back();
  }
  const uint32_t space = free_spaces_.back();
  free_spaces_.pop_back();
  const NodeId root = new_node();
  nodes_[root].space = space;
  const uint32_t words = opaque ? kKeyWords : page_size;
  spaces[space] = {
      .name = name, .page_size = page_size, .root = root, .words = words, .opaque = opaque};
  return space;
}

bool RadixTree::close_space(uint32_t space) {
  const NodeId root = spaces[space].root;
  if (nodes_[root].first_child != kNoNode) return false;
  KVC2_CHECK(nodes_[root].pools.empty() && !lives_.contains(root), "root %u has no block", root);
  forget_node(root);
  spaces[space] = {.name = {}, .page_size = 0, .root = kNoNode, .closed = true};
  free_spaces_.push_back(space);
  return true;
}

// Walks the namespace's nodes.
uint32_t RadixTree::retire(uint32_t space) {
  spaces[space].retired = true;
  uint32_t found = 0;
  std::vector<NodeId> nodes{spaces[space].root};
  for (size_t i = 0; i < nodes.size(); ++i) {
    found += nodes_[nodes[i]].blocks();
    refresh(nodes[i]);
    for (NodeId c = nodes_[nodes[i]].first_child; c != kNoNode; c = nodes_[c].next) {
      nodes.push_back(c);
    }
  }
  return found;
}

NodeId RadixTree::new_node() {
  NodeId id;
  if (free_nodes_.empty()) {
    id = static_cast<NodeId>(nodes_.size());
    nodes_.emplace_back();
  } else {
    id = free_nodes_.back();
    free_nodes_.pop_back();
  }
  nodes_[id].live = true;
  ++live_nodes;
  return id;
}

Tokens RadixTree::tokens_at(const Node& node, uint32_t offset) const {
  const uint32_t size = spaces[node.space].words;
  return Tokens(node.tokens).subspan(size_t{offset} * size, size);
}

Tokens RadixTree::tokens(Place at) const { return tokens_at(nodes_[at.node], at.offset); }

const Digest* RadixTree::extras_of(NodeId node) const {
  return nodes_[node].has_extras ? &extras_.at(node) : nullptr;
}

Block RadixTree::block(Place at) const {
  return {tokens(at), at.offset == 0 ? extras_of(at.node) : nullptr};
}

static bool same_extras(const Digest* a, const Digest* b) { return a == b || (a && b && *a == *b); }

bool RadixTree::is(Place at, const Block& block) const {
  const Block there = this->block(at);
  return std::ranges::equal(there.tokens, block.tokens) && same_extras(there.extras, block.extras);
}

// The first block of `from` is that of `to` now.
void RadixTree::give_extras(NodeId from, NodeId to) {
  if (!nodes_[from].has_extras) return;
  extras_[to] = extras_.at(from);
  extras_.erase(from);
  nodes_[from].has_extras = false;
  nodes_[to].has_extras = true;
}

NodeId RadixTree::child(NodeId node, const BlockKey& key, const Block& block) const {
  const NodeId found = heads_.get(key);
  if (found == kNoNode) return kNoNode;
  return nodes_[found].parent == node && is({found, 0}, block) ? found : kNoNode;
}

// How many leading blocks of `wanted` are `held`. One memcmp when all are, the usual case.
static uint32_t equal_blocks(Tokens held, Tokens wanted, uint32_t page_size) {
  const size_t common = std::min(held.size(), wanted.size() / page_size * page_size);
  if (std::memcmp(held.data(), wanted.data(), common * sizeof(uint32_t)) == 0) {
    return static_cast<uint32_t>(common / page_size);
  }
  const auto end = held.begin() + static_cast<std::ptrdiff_t>(common);
  const auto differ = std::mismatch(held.begin(), end, wanted.begin()).first;
  return static_cast<uint32_t>((differ - held.begin()) / page_size);
}

std::vector<Run> RadixTree::find(uint32_t space, Content content) const {
  const uint32_t size = spaces[space].words;
  std::vector<Run> path;
  NodeId node = spaces[space].root;
  while (content.tokens.size() >= size) {
    const Node& at = nodes_[node];
    const Block block = content.block(0, size);
    const NodeId above = node;
    node = heads_.get(
        next_key(at.keys.empty() ? root_key(spaces[space].name) : at.keys.back(), block));
    if (node == kNoNode || nodes_[node].parent != above) break;
    const uint32_t same = equal_blocks(nodes_[node].tokens, content.until_extras(1, size), size);
    if (same == 0 || !same_extras(extras_of(node), block.extras)) break;
    path.push_back({node, 0, same});
    if (same < nodes_[node].blocks()) break;
    content = content.after(same, size);
  }
  return path;
}

std::optional<Place> RadixTree::parent(Place at) const {
  if (at.offset > 0) return Place{at.node, at.offset - 1};
  const NodeId above = nodes_[at.node].parent;
  if (nodes_[above].parent == kNoNode) return std::nullopt;  // a root has no block
  return Place{above, nodes_[above].blocks() - 1};
}

std::optional<Place> RadixTree::next(Place at, const Block& block) const {
  const Node& node = nodes_[at.node];
  const uint32_t offset = at.offset + 1;
  if (offset < node.blocks()) {
    if (!is({at.node, offset}, block)) return std::nullopt;
    return Place{at.node, offset};
  }
  if (node.first_child == kNoNode) return std::nullopt;  // the usual commit: nothing to hash
  const BlockKey key =
      next_key(node.keys.empty() ? root_key(spaces[node.space].name) : node.keys.back(), block);
  const NodeId found = child(at.node, key, block);
  if (found == kNoNode) return std::nullopt;
  return Place{found, 0};
}

std::optional<Place> RadixTree::next(Place at, const BlockKey& key) const {
  const Node& node = nodes_[at.node];
  const uint32_t offset = at.offset + 1;
  if (offset < node.blocks()) {
    if (!(node.keys[offset] == key)) return std::nullopt;
    return Place{at.node, offset};
  }
  const NodeId found = heads_.get(key);
  if (found == kNoNode || nodes_[found].parent != at.node) return std::nullopt;
  return Place{found, 0};
}

// Whether the block after `at` cannot have this key, since other tokens have it.
bool RadixTree::collides(Place at, const BlockKey& key) const {
  const Node& node = nodes_[at.node];
  const uint32_t offset = at.offset + 1;
  const bool branches = offset < node.blocks();
  const auto taken = [&](const BlockKey& head) { return heads_.get(head) != kNoNode; };
  if (taken(key) || (branches && node.keys[offset] == key)) return true;
  return branches && taken(node.keys[offset]);  // the key that a split adds
}

std::optional<Place> RadixTree::insert(Place at, const Block& block, uint32_t stamp,
                                       bool restored) {
  if (const auto there = next(at, block)) return there;
  const Node& node = nodes_[at.node];
  const uint32_t offset = at.offset + 1;
  const BlockKey key =
      next_key(node.keys.empty() ? root_key(spaces[node.space].name) : node.keys[at.offset], block);
  if (collides(at, key)) {
    ++collisions;
    return std::nullopt;
  }
  const NodeId above = offset < node.blocks() ? split(at.node, offset) : at.node;
  const bool extend =
      nodes_[above].parent != kNoNode && nodes_[above].first_child == kNoNode && !block.extras;
  NodeId into = above;
  if (!extend) {
    into = new_node();
    nodes_[into].space = nodes_[above].space;
    nodes_[into].first = nodes_[above].first + nodes_[above].blocks();
    adopt_child(above, into);
    heads_.put(key, into);
    if (block.extras) extras_[into] = *block.extras;
    nodes_[into].has_extras = block.extras != nullptr;
  }
  const Run added = append(into, {&key, 1}, block.tokens, stamp, restored);
  refresh(above);
  return Place{added.node, added.offset};
}

bool RadixTree::last(Place at) const {
  const Node& node = nodes_[at.node];
  return at.offset + 1 == node.blocks() && node.first_child == kNoNode;
}

// No key collides here: only the first key of a node is in the table, and these come after it.
Run RadixTree::append(NodeId node, Tokens tokens, uint32_t stamp) {
  const Node& to = nodes_[node];
  KVC2_CHECK(to.blocks() > 0 && to.first_child == kNoNode, "node %u is not a path's end", node);
  return append(node, chain_keys(to.keys.back(), tokens, spaces[to.space].words), tokens, stamp,
                false);
}

Run RadixTree::append(NodeId node, std::span<const BlockKey> keys, Tokens tokens, uint32_t stamp,
                      bool restored) {
  Node& to = nodes_[node];
  const Run added{node, to.blocks(), static_cast<uint32_t>(keys.size())};
  to.tokens.insert(to.tokens.end(), tokens.begin(), tokens.end());
  to.keys.insert(to.keys.end(), keys.begin(), keys.end());
  const auto& uses_above = nodes_[to.parent].uses;
  const Use* parent = uses_above.empty() ? nullptr : &uses_above.back();
  for (const BlockKey& key : keys) {
    if (!to.uses.empty()) parent = &to.uses.back();
    to.uses.push_back(restored ? policy_.restored(stamp) : policy_.added(key, parent, stamp));
  }
  blocks += added.blocks;
  holes += added.blocks;  // until pages are placed
  return added;
}

void RadixTree::adopt_child(NodeId parent, NodeId child) {
  const NodeId second = nodes_[parent].first_child;
  nodes_[child].parent = parent;
  nodes_[child].previous = kNoNode;
  nodes_[child].next = second;
  if (second != kNoNode) nodes_[second].previous = child;
  nodes_[parent].first_child = child;
}

void RadixTree::orphan_child(NodeId child) {
  Node& node = nodes_[child];
  if (node.previous != kNoNode) nodes_[node.previous].next = node.next;
  if (node.next != kNoNode) nodes_[node.next].previous = node.previous;
  if (nodes_[node.parent].first_child == child) nodes_[node.parent].first_child = node.next;
  node.parent = node.previous = node.next = kNoNode;
}

template <typename T>
static std::vector<T> cut_front(std::vector<T>& from, size_t count) {
  count = std::min(count, from.size());
  const auto end = from.begin() + static_cast<std::ptrdiff_t>(count);
  std::vector<T> front(from.begin(), end);
  from.erase(from.begin(), end);
  return front;
}

void RadixTree::split_residency(Node& head, NodeId head_id, Node& tail, uint32_t at) {
  const NodeId tail_id = head.first_child;
  for (Residency& in : tail.pools) {
    set_rank(tail_id, in, kNotEvictable);
    Residency above{.pool = in.pool, .pages = cut_front(in.pages, at)};
    for (const PageId page : above.pages) {
      if (page == kNoPage) continue;
      pools_[in.pool][page].node = head_id;
      ++above.count;
      above.arriving += pools_[in.pool].state(page) == PageState::kInFlight;
    }
    while (!above.pages.empty() && above.pages.back() == kNoPage) above.pages.pop_back();
    in.count -= above.count;
    in.arriving -= above.arriving;
    above.children = in.any() ? 1 : 0;
    head.pools.push_back(std::move(above));
  }
  std::erase_if(tail.pools, [](const Residency& in) { return !in.any(); });
}

// The blocks before `at` go to a new node above. The others stay in `node`, with its children.
NodeId RadixTree::split(NodeId node, uint32_t at) {
  const NodeId head_id = new_node();
  Node& head = nodes_[head_id];
  Node& tail = nodes_[node];
  const NodeId above = tail.parent;
  orphan_child(node);
  adopt_child(above, head_id);
  adopt_child(head_id, node);
  head.space = tail.space;
  head.first = tail.first;
  tail.first += at;
  head.reused_blocks = std::min(tail.reused_blocks, at);
  tail.reused_blocks -= head.reused_blocks;
  head.tokens = cut_front(tail.tokens, size_t{at} * spaces[head.space].words);
  head.keys = cut_front(tail.keys, at);
  head.uses = cut_front(tail.uses, at);
  head.digests = cut_front(tail.digests, at);
  heads_.put(head.keys[0], head_id);
  heads_.put(tail.keys[0], node);
  give_extras(node, head_id);
  split_residency(head, head_id, tail, at);
  split_lives(head_id, node, at);
  refresh(head_id);
  refresh(node);
  return head_id;
}

// A join moves the blocks of both nodes, and looks at each page of the upper one. Up to this size
// it takes microseconds; beyond it there is little to gain: a hash in some thousands of tokens.
constexpr size_t kJoinTokens = 8192;
constexpr uint32_t kJoins = 256;  // of one path at a time

// Where the upper run is much the longer, joins would change the owner of its pages over and over.
bool RadixTree::may_join(NodeId above, NodeId node) const {
  const Node &head = nodes_[above], &tail = nodes_[node];
  return head.parent != kNoNode && head.first_child == node && tail.next == kNoNode &&
         !tail.has_extras && head.blocks() <= 2 * tail.blocks() &&
         head.tokens.size() + tail.tokens.size() <= kJoinTokens;
}

std::vector<Run> RadixTree::join(std::span<const Run> path) {
  std::vector<Run> joined;
  uint32_t joins = 0;
  for (Run run : path) {
    if (!joined.empty() && joins < kJoins && may_join(joined.back().node, run.node)) {
      join(joined.back().node, run.node);
      run = {run.node, 0, joined.back().blocks + run.blocks};
      joined.pop_back();
      ++joins;
    }
    joined.push_back(run);
  }
  return joined;
}

template <typename T>
static void put_front(std::vector<T>& to, const std::vector<T>& front) {
  to.insert(to.begin(), front.begin(), front.end());
}

// The inverse of a split: the blocks of the node above go to `node`, its only child.
void RadixTree::join(NodeId above, NodeId node) {
  Node& head = nodes_[above];
  Node& tail = nodes_[node];
  join_residency(above, node);
  join_lives(above, node);
  heads_.erase(tail.keys[0]);
  heads_.put(head.keys[0], node);
  tail.first = head.first;
  tail.reused_blocks += head.reused_blocks;
  put_front(tail.tokens, head.tokens);
  put_front(tail.keys, head.keys);
  put_front(tail.uses, head.uses);
  put_front(tail.digests, head.digests);
  give_extras(above, node);
  const NodeId parent = head.parent;
  orphan_child(node);
  orphan_child(above);
  adopt_child(parent, node);
  forget_node(above);
  refresh(node);
}

void RadixTree::join_residency(NodeId above, NodeId node) {
  const uint32_t upper = nodes_[above].blocks();
  for (Residency& from : nodes_[above].pools) {
    set_rank(above, from, kNotEvictable);
    Residency& to = residency(nodes_[node], from.pool);
    set_rank(node, to, kNotEvictable);
    for (const PageId page : from.pages) {
      if (page != kNoPage) pools_[from.pool][page].node = node;
    }
    if (!to.pages.empty()) from.pages.resize(upper, kNoPage);
    put_front(to.pages, from.pages);
    to.count += from.count;
    to.arriving += from.arriving;
  }
}

void RadixTree::forget_node(NodeId id) {
  if (nodes_[id].has_extras) extras_.erase(id);
  nodes_[id] = Node{};
  free_nodes_.push_back(id);
  --live_nodes;
}

void RadixTree::remove_tail(Node& node) {
  const uint32_t left = node.blocks() - 1;
  node.tokens.resize(size_t{left} * spaces[node.space].words);
  node.keys.pop_back();
  node.uses.pop_back();
  if (node.digests.size() > left) node.digests.pop_back();
  node.reused_blocks = std::min(node.reused_blocks, left);
  --blocks;
  --holes;
}

void RadixTree::trim(NodeId id) {
  while (nodes_[id].parent != kNoNode && nodes_[id].first_child == kNoNode) {
    Node& node = nodes_[id];
    const BlockKey head = node.keys[0];
    while (node.blocks() > 0 && !anywhere({id, node.blocks() - 1})) remove_tail(node);
    trim_lives(id);
    refresh(id);
    if (node.blocks() > 0) return;
    const NodeId above = node.parent;
    heads_.erase(head);
    orphan_child(id);
    KVC2_CHECK(node.pools.empty(), "node %u has no block, but pages", id);
    forget_node(id);
    refresh(above);  // it may be a leaf now
    id = above;
  }
}

const Digest& RadixTree::digest(Place at) {
  std::vector<NodeId> unnamed;  // nodes on the path, deepest first
  NodeId id = at.node;
  uint32_t wanted = at.offset + 1;
  while (nodes_[id].parent != kNoNode && nodes_[id].digests.size() < wanted) {
    unnamed.push_back(id);
    id = nodes_[id].parent;
    wanted = nodes_[id].blocks();
  }
  for (auto node = unnamed.rbegin(); node != unnamed.rend(); ++node) {
    Node& to = nodes_[*node];
    const uint32_t end = *node == at.node ? at.offset + 1 : to.blocks();
    for (auto i = static_cast<uint32_t>(to.digests.size()); i < end; ++i) {
      const Digest name = next_digest(parent_digest({*node, i}), block({*node, i}));
      to.digests.push_back(name);
    }
  }
  return nodes_[at.node].digests[at.offset];
}

const Digest& RadixTree::parent_digest(Place at) {
  const auto above = parent(at);
  return above ? digest(*above) : spaces[nodes_[at.node].space].name;
}

size_t RadixTree::metadata_bytes(NodeId begin, NodeId end) const {
  size_t bytes = (end - begin) * sizeof(Node);
  for (NodeId id = begin; id < end; ++id) {
    const Node& node = nodes_[id];
    bytes += node.keys.capacity() * sizeof(BlockKey) + node.uses.capacity() * sizeof(Use) +
             node.digests.capacity() * sizeof(Digest) + node.pools.capacity() * sizeof(Residency);
    for (const Residency& in : node.pools) bytes += in.pages.capacity() * sizeof(PageId);
  }
  return bytes;
}

size_t RadixTree::table_bytes() const {
  constexpr size_t kOrderBytes = 48;  // a node of an order's set
  size_t bytes = heads_.metadata_bytes() + free_nodes_.capacity() * sizeof(NodeId);
  for (const EvictionOrder& order : orders_) bytes += order.size() * kOrderBytes;
  constexpr size_t kLink = 2 * sizeof(void*);  // of a hash map's entry
  bytes += extras_.size() * (sizeof(*extras_.begin()) + kLink);
  for (const auto& [id, lives] : lives_) {
    bytes += sizeof(NodeLives) + 2 * kOrderBytes + lives.runs.capacity() * sizeof(LifeRun);
  }
  return bytes;
}

}  // namespace kvc2
