// Index: which leading blocks are where, and why the first one that is missing is. Changes nothing.
#include <algorithm>

#include "index/index.h"

namespace kvc2 {

constexpr PoolId kNoPool = 0xFFFFFFFF;
constexpr uint32_t kSiblingsMax = 4096;  // 0.4 ms; the newest branches are looked at

Cause Index::cause_of_end(Place at) const {
  const bool retired = tree_.spaces[tree_[at.node].space].retired;
  return retired ? Cause::kInvalidated : Cause::kExpired;
}

void Index::bury(Place at, PoolId last, Cause cause) {
  if (cause == Cause::kEvicted && tree_.dead(at)) cause = cause_of_end(at);
  obituaries_.record({.key = tree_[at.node].keys[at.offset],
                      .when = tree_.now(),
                      .pool = last,
                      .cause = static_cast<uint32_t>(cause)});
}

// Of the blocks that stand where one with these tokens would, after `last`.
std::optional<Sibling> Index::sibling_of(Place last, Tokens block, uint32_t most) const {
  std::optional<Sibling> best;
  const auto consider = [&](Place at) {
    if (!tree_.resident_elsewhere(at, kNoPool) || tree_.dead(at)) return;
    const Tokens there = tree_.tokens(at);
    const auto differ = std::ranges::mismatch(there, block).in1;
    const auto common = static_cast<uint32_t>(differ - there.begin());
    if (best && best->common >= common) return;
    best = Sibling{common, {there.begin(), there.end()}};
  };
  const Node& node = tree_[last.node];
  if (last.offset + 1 < node.blocks()) {
    consider({last.node, last.offset + 1});
    return best;
  }
  for (NodeId child = node.first_child; child != kNoNode && most-- > 0; child = tree_[child].next) {
    consider({child, 0});
  }
  return best;
}

// The block with this key and these tokens is missing after `last`.
Miss Index::why_absent(Place last, const BlockKey& key, Tokens block, uint32_t siblings) const {
  Miss miss{.why = Why::kNeverSeen, .death = obituaries_.find(key)};
  miss.sibling = sibling_of(last, block, siblings);
  if (miss.sibling) miss.why = Why::kDiverged;
  if (miss.death) miss.why = Why::kDied;
  return miss;
}

// It is in the tree, but matches no more.
Obituary Index::ended(Place at) const {
  PoolId holder = 0;
  while (!pools_[holder] || tree_.page(at, holder) == kNoPage) ++holder;
  const Node& node = tree_[at.node];
  const Cause cause = cause_of_end(at);
  const bool expired = cause == Cause::kExpired;
  return {.key = node.keys[at.offset],
          .when = expired ? tree_.life(at).expires : tree_.spaces[node.space].retired_at,
          .pool = holder,
          .cause = static_cast<uint32_t>(cause)};
}

// `at` is in the tree, but resident in none of the pools that were asked for.
Miss Index::why_passed(Place at) const {
  if (!tree_.anywhere(at)) {
    return {.why = Why::kHole, .death = obituaries_.find(tree_[at.node].keys[at.offset])};
  }
  if (tree_.dead(at)) return {.why = Why::kDied, .death = ended(at)};
  return {.why = tree_.resident_elsewhere(at, kNoPool) ? Why::kElsewhere : Why::kArriving};
}

static std::vector<TierRun> runs_of(std::span<const uint8_t> tiers) {
  std::vector<TierRun> runs;
  for (auto from = tiers.begin(); from != tiers.end() && runs.size() < Explanation::kRunsMax;) {
    const auto to = std::find_if(from, tiers.end(), [&](uint8_t tier) { return tier != *from; });
    runs.push_back({*from, static_cast<uint32_t>(to - from)});
    from = to;
  }
  return runs;
}

Explanation Index::explanation(const Found& found, Tokens tokens, uint32_t siblings) const {
  Explanation answer{.blocks = static_cast<uint32_t>(found.tiers.size()),
                     .runs = runs_of(found.tiers)};
  const size_t size = tree_.spaces[found.space].page_size;
  if (tokens.size() / size <= answer.blocks) return answer;
  if (found.passed) {
    answer.miss = why_passed(*found.passed);
    return answer;
  }
  const Tokens block = tokens.subspan(answer.blocks * size, size);
  const Node& node = tree_[found.last.node];
  const bool first = found.last.offset == kBeforeFirst;
  const BlockKey before =
      first ? root_key(tree_.spaces[found.space].name) : node.keys[found.last.offset];
  answer.miss = why_absent(found.last, next_key(before, block), block, siblings);
  return answer;
}

Explanation Index::explain(uint32_t space, std::span<const PoolId> pools, Tokens tokens) const {
  const Lock lock(mutex_);
  if (pools.empty() || pools.size() > 0xFF) throw std::invalid_argument("pools: 1 to 255 of them");
  for (const PoolId each : pools) check_space(space, each);
  return explanation(find(space, pools, tree_.find(space, tokens)), tokens, kSiblingsMax);
}

}  // namespace kvc2
