// The tree's third part: what requests said of blocks (life.h), as runs of blocks that live alike,
// kept beside the tree for the few nodes that a request said something of.
#include <algorithm>

#include "base/check.h"
#include "index/radix_tree.h"

namespace kvc2 {

Life RadixTree::life(Place at) const {
  if (lives_.empty()) return {};
  const auto found = lives_.find(at.node);
  if (found == lives_.end()) return {};
  for (const LifeRun& run : found->second.runs) {
    if (at.offset < run.end) return run.life;
  }
  return {};
}

bool RadixTree::dead(Place at) const {
  return spaces[nodes_[at.node].space].retired || life(at).expired(now_);
}

uint32_t RadixTree::living_blocks(const Run& run) const {
  const auto found = lives_.find(run.node);
  if (found == lives_.end()) return run.blocks;
  uint32_t start = 0;
  for (const LifeRun& each : found->second.runs) {
    if (each.life.expired(now_) && each.end > run.offset) {
      return std::min(run.blocks, std::max(start, run.offset) - run.offset);
    }
    start = each.end;
  }
  return run.blocks;
}

// The lives of blocks [from, to) of a node become what `change` makes of them.
template <typename Change>
void RadixTree::change_lives(NodeId id, uint32_t from, uint32_t to, Change change) {
  if (from >= to) return;
  std::vector<LifeRun> runs;
  const auto add = [&](uint32_t end, const Life& life) {
    if (!runs.empty() && runs.back().life == life) {
      runs.back().end = end;
    } else {
      runs.push_back({end, life});
    }
  };
  uint32_t start = 0;
  const auto add_changed = [&](uint32_t end, const Life& life) {
    if (start >= end) return;
    const uint32_t first = std::clamp(from, start, end), last = std::clamp(to, start, end);
    if (first > start) add(first, life);
    if (last > first) add(last, change(life));
    if (end > last) add(end, life);
    start = end;
  };
  if (const auto found = lives_.find(id); found != lives_.end()) {
    for (const LifeRun& run : found->second.runs) add_changed(run.end, run.life);
  }
  add_changed(nodes_[id].blocks(), Life{});
  set_lives(id, std::move(runs));
  refresh(id);
}

uint32_t RadixTree::next_expiry(std::span<const LifeRun> runs) const {
  uint32_t next = 0;
  for (const LifeRun& run : runs) {
    for (const uint32_t at : {run.life.expires, run.life.returns}) {
      if (at > now_ && (next == 0 || at < next)) next = at;
    }
  }
  return next;
}

void RadixTree::set_lives(NodeId id, std::vector<LifeRun>&& runs) {
  while (!runs.empty() && runs.back().life == Life{}) runs.pop_back();
  const auto found = lives_.find(id);
  if (found != lives_.end() && found->second.due != 0) due_.erase({found->second.due, id});
  if (runs.empty()) {
    if (found != lives_.end()) lives_.erase(found);
    return;
  }
  const uint32_t due = next_expiry(runs);
  if (due != 0) due_.insert({due, id});
  lives_[id] = {std::move(runs), due};
}

void RadixTree::split_lives(NodeId head, NodeId tail, uint32_t at) {
  const auto found = lives_.find(tail);
  if (found == lives_.end()) return;
  std::vector<LifeRun> above, below;
  for (const LifeRun& run : found->second.runs) {
    if (above.empty() || above.back().end < at) above.push_back({std::min(run.end, at), run.life});
    if (run.end > at) below.push_back({run.end - at, run.life});
  }
  set_lives(head, std::move(above));
  set_lives(tail, std::move(below));
}

// The blocks of the node above are about to join `node`, in front: their lives go before them.
void RadixTree::join_lives(NodeId above, NodeId node) {
  if (lives_.empty()) return;
  const auto runs_of = [&](NodeId id) {
    const auto found = lives_.find(id);
    return found == lives_.end() ? std::vector<LifeRun>{} : found->second.runs;
  };
  std::vector<LifeRun> runs = runs_of(above);
  const uint32_t upper = nodes_[above].blocks();
  if ((runs.empty() ? 0 : runs.back().end) < upper) runs.push_back({upper, Life{}});
  for (const LifeRun& run : runs_of(node)) runs.push_back({run.end + upper, run.life});
  set_lives(above, {});
  set_lives(node, std::move(runs));
}

// The node has lost trailing blocks.
void RadixTree::trim_lives(NodeId id) {
  const auto found = lives_.find(id);
  if (found == lives_.end()) return;
  std::vector<LifeRun> runs = std::move(found->second.runs);
  const uint32_t left = nodes_[id].blocks();
  while (!runs.empty() && (runs.size() > 1 ? runs[runs.size() - 2].end : 0) >= left) {
    runs.pop_back();
  }
  if (!runs.empty()) runs.back().end = std::min(runs.back().end, left);
  set_lives(id, std::move(runs));
}

void RadixTree::say(Place at, const Life& said, uint32_t fresh) {
  if (lives_.empty() && said == Life{}) return;
  uint32_t end = at.offset + 1;
  for (NodeId id = at.node; nodes_[id].parent != kNoNode; id = nodes_[id].parent) {
    const uint32_t first = nodes_[id].first;
    const uint32_t known = std::clamp(fresh, first, first + end) - first;
    if (said != Life{} || lives_.contains(id)) {
      change_lives(id, 0, known, [&](const Life& life) { return merged(life, said); });
      change_lives(id, known, end, [&](const Life&) { return said; });
    }
    end = nodes_[nodes_[id].parent].blocks();
  }
}

void RadixTree::end_tail(Place at, uint32_t stamp) {
  NodeId below = kNoNode;
  uint32_t end = at.offset + 1;
  for (NodeId id = at.node; nodes_[id].parent != kNoNode; id = nodes_[id].parent) {
    const Node& node = nodes_[id];
    const bool alone =
        below == kNoNode ? node.first_child == kNoNode : nodes_[node.first_child].next == kNoNode;
    if (!alone || end < node.blocks()) return;
    uint32_t from = end;
    while (from > 0 && node.uses[from - 1].stamp == stamp) --from;
    change_lives(id, from, end, [](Life life) {
      life.ended = true;
      return life;
    });
    if (from > 0) return;
    below = id;
    end = nodes_[node.parent].blocks();
  }
}

void RadixTree::expire_by(uint32_t space, uint32_t second) {
  std::vector<NodeId> nodes{spaces[space].root};
  for (size_t i = 0; i < nodes.size(); ++i) {
    change_lives(nodes[i], 0, nodes_[nodes[i]].blocks(), [&](Life life) {
      life.expires = life.expires == 0 ? second : std::min(life.expires, second);
      return life;
    });
    for (NodeId c = nodes_[nodes[i]].first_child; c != kNoNode; c = nodes_[c].next) {
      nodes.push_back(c);
    }
  }
}

uint32_t RadixTree::advance(uint32_t now) {
  now_ = std::max(now_, now);
  uint32_t nodes = 0;
  for (; !due_.empty() && due_.begin()->first <= now_; ++nodes) {
    const NodeId id = due_.begin()->second;
    set_lives(id, std::vector<LifeRun>(lives_[id].runs));
    refresh(id);
  }
  for (const BlockKey& block : pins.advance(now_)) {
    const NodeId id = heads_.get(block);  // its node, or one with an equal key: no harm is done
    if (id == kNoNode) continue;
    refresh(id);
    ++nodes;
  }
  return nodes;
}

}  // namespace kvc2
