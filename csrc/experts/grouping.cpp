#include "experts/grouping.h"

#include <algorithm>

namespace kvc2::experts {

Grouping::Grouping(const Ffn& call, size_t panel_tokens, size_t share_tokens) {
  const size_t choices = call.expert_ids == nullptr ? 0 : call.tokens * call.chosen;
  const auto is_ours = [&](size_t s) { return call.expert_ids[s] >= 0; };
  std::vector<size_t> next(call.experts + 1);
  for (size_t s = 0; s < choices; ++s) {
    if (is_ours(s)) ++next[static_cast<size_t>(call.expert_ids[s]) + 1];
  }
  for (size_t e = 0; e < call.experts; ++e) {
    const size_t begin = next[e], count = next[e + 1], end = begin + count;
    for (size_t at = begin; at < end; at += share_tokens) {
      const size_t first_panel = all_panels_.size() + (at - begin) / panel_tokens;
      all_shares_.push_back({e, at, std::min(share_tokens, end - at), first_panel});
    }
    for (size_t at = begin; at < end; at += panel_tokens) {
      all_panels_.push_back({at, std::min(panel_tokens, end - at)});
    }
    next[e + 1] = end;
  }
  all_slots_.resize(next.back());
  for (size_t s = 0; s < choices; ++s) {
    if (is_ours(s)) all_slots_[next[static_cast<size_t>(call.expert_ids[s])]++] = s;
  }
  slots = all_slots_.data(), panels = all_panels_.data(), shares = all_shares_.data();
  num_slots = all_slots_.size(), num_panels = all_panels_.size(), num_shares = all_shares_.size();
}

Grouping::~Grouping() = default;

}  // namespace kvc2::experts
