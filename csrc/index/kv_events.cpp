#include "index/kv_events.h"

namespace kvc2 {

constexpr size_t kEventBytes = 3 + 2 * sizeof(uint32_t) + 2 * sizeof(Digest) + 2 * sizeof(BlockKey);

size_t KvEvents::bytes() const { return size() * kEventBytes + words.size() * sizeof(uint32_t); }

void KvEventQueue::Scan::tell(PoolId of, PageId at) {
  if (told.size() <= of) told.resize(of + 1);
  if (told[of].size() <= at) told[of].resize(size_t{at} + 1, false);
  told[of][at] = true;
}

bool KvEventQueue::has_room(const KvBlock& block) const {
  const size_t more = kEventBytes + block.block.tokens.size() * sizeof(uint32_t);
  return !full_chunk() && (empty() || bytes_ + more <= bytes_max_);
}

void KvEventQueue::append(const std::optional<KvBlock>& of, uint8_t tier, KvEventKind kind) {
  if (empty() || full_chunk()) chunks_.emplace_back();
  KvEvents& to = chunks_.back();
  bytes_ -= to.bytes();
  const bool named = of && (of->opaque || kind == KvEventKind::kStored);
  const Tokens words = named ? of->block.tokens : Tokens{};
  to.kinds.push_back(static_cast<uint8_t>(kind));
  to.tiers.push_back(tier);
  to.opaque.push_back(of && of->opaque);
  to.page_sizes.push_back(of ? of->page_size : 0);
  to.words_of.push_back(static_cast<uint32_t>(words.size()));
  to.words.insert(to.words.end(), words.begin(), words.end());
  to.namespaces.push_back(of ? of->space : Digest{});
  to.extras.push_back(of && of->block.extras ? *of->block.extras : Digest{});
  to.keys.push_back(of ? of->key : BlockKey{});
  to.parents.push_back(of ? of->parent : BlockKey{});
  bytes_ += to.bytes();
}

void KvEventQueue::stored(const KvBlock& block, uint8_t tier) {
  append(block, tier, KvEventKind::kStored);
  if (bytes_ <= bytes_max_) return;
  ++overflows_;
  tell_anew();
}

void KvEventQueue::removed(const KvBlock& block, uint8_t tier) {
  append(block, tier, KvEventKind::kRemoved);
  if (bytes_ <= bytes_max_) return;
  ++overflows_;
  tell_anew();
}

void KvEventQueue::tell_anew() {
  if (!on()) return;
  chunks_.clear();
  bytes_ = 0;
  append({}, 0, KvEventKind::kCleared);
  scan.emplace();
}

KvEvents KvEventQueue::take() {
  if (empty()) return {};
  KvEvents first = std::move(chunks_.front());
  chunks_.pop_front();
  bytes_ -= first.bytes();
  return first;
}

}  // namespace kvc2
