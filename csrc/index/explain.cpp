#include "index/explain.h"

#include <algorithm>

#include "index/evictor.h"

namespace kvc2 {

constexpr PoolId kNoPool = 0xFFFFFFFF;

// Of the blocks that stand where one with these tokens would, after `last`.
static std::optional<Sibling> sibling_of(const RadixTree& tree, Place last, Tokens block,
                                         uint32_t most) {
  std::optional<Sibling> best;
  const auto consider = [&](Place at) {
    if (!tree.resident_elsewhere(at, kNoPool) || tree.dead(at)) return;
    const Tokens there = tree.tokens(at);
    const auto differ = std::ranges::mismatch(there, block).in1;
    const auto common = static_cast<uint32_t>(differ - there.begin());
    if (best && best->common >= common) return;
    best = Sibling{common, {there.begin(), there.end()}};
  };
  const Node& node = tree[last.node];
  if (last.offset + 1 < node.blocks()) {
    consider({last.node, last.offset + 1});
    return best;
  }
  for (NodeId child = node.first_child; child != kNoNode && most-- > 0; child = tree[child].next) {
    consider({child, 0});
  }
  return best;
}

// No block with this name and these tokens is in the tree.
static Miss why_absent(std::optional<Obituary>&& death, std::optional<Sibling>&& sibling) {
  Miss miss{.why = Why::kNeverSeen, .death = std::move(death), .sibling = std::move(sibling)};
  if (miss.sibling) miss.why = Why::kDiverged;
  if (miss.death) miss.why = Why::kDied;
  return miss;
}

// The block is in the tree, but matches no more.
static Obituary ended(const RadixTree& tree, Place at) {
  const Node& node = tree[at.node];
  PoolId holder = kNoPool;
  for (const Residency& in : node.pools) {
    if (tree.page(at, in.pool) != kNoPage) holder = std::min(holder, in.pool);
  }
  const Cause cause = cause_of_end(tree, at);
  const bool expired = cause == Cause::kExpired;
  return {.key = node.keys[at.offset],
          .when = expired ? tree.life(at).expires : tree.spaces[node.space].retired_at,
          .pool = holder,
          .cause = static_cast<uint32_t>(cause)};
}

// `at` is in the tree, but resident in none of the pools that were asked for.
static Miss why_passed(const RadixTree& tree, const Obituaries& dead, Place at) {
  if (!tree.anywhere(at)) {
    return {.why = Why::kHole, .death = dead.find(tree[at.node].keys[at.offset])};
  }
  if (tree.dead(at)) return {.why = Why::kDied, .death = ended(tree, at)};
  return {.why = tree.resident_elsewhere(at, kNoPool) ? Why::kElsewhere : Why::kArriving};
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

Explanation explanation_of(const RadixTree& tree, const Obituaries& dead, const Found& found,
                           const Content& prompt, uint32_t siblings) {
  Explanation answer{.blocks = static_cast<uint32_t>(found.tiers.size()),
                     .runs = runs_of(found.tiers)};
  const size_t size = tree.spaces[found.space].words;
  if (prompt.tokens.size() / size <= answer.blocks) return answer;
  if (found.passed) {
    answer.miss = why_passed(tree, dead, *found.passed);
    return answer;
  }
  const Block block = prompt.block(answer.blocks, size);
  const Node& node = tree[found.last.node];
  const bool first = found.last.offset == kBeforeFirst;
  const BlockKey before =
      first ? root_key(tree.spaces[found.space].name) : node.keys[found.last.offset];
  answer.miss = why_absent(dead.find(next_key(before, block)),
                           sibling_of(tree, found.last, block.tokens, siblings));
  return answer;
}

}  // namespace kvc2
