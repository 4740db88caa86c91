// ReuseCurve: distances of sampled blocks, and what they say of other capacities.
#include "index/reuse_curve.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace kvc2 {

static constexpr uint32_t kOrderPerSample = 4;  // packed when three quarters are outdated

ReuseCurve::ReuseCurve(uint32_t sample_max)
    : sample_max_(sample_max), order_(size_t{sample_max} * kOrderPerSample + 1) {}

uint64_t ReuseCurve::hash_of(const BlockKey& key) {
  uint64_t word;  // not the half that hash tables take
  std::memcpy(&word, key.data() + 8, sizeof word);
  return word;
}

uint32_t ReuseCurve::bucket_of(double distance) {
  const double step = std::log2(std::max(distance, 1.0)) * kSteps;
  return std::min(static_cast<uint32_t>(std::ceil(step)), kBuckets - 1);
}

double ReuseCurve::rate() const { return std::ldexp(static_cast<double>(limit_), -64); }

void ReuseCurve::access(std::span<const BlockKey> path, uint32_t page_size, uint64_t tokens) {
  tokens_ += tokens;
  asked_ += path.size() * page_size;
  note(path, page_size, true);
}

void ReuseCurve::add(const BlockKey& key, uint32_t page_size) { note({&key, 1}, page_size, false); }

void ReuseCurve::note(std::span<const BlockKey> keys, uint32_t page_size, bool asked) {
  const size_t before = hashes_.size();
  for (const BlockKey& key : keys) {
    if (const uint64_t hash = hash_of(key); is_sampled(hash)) hashes_.push_back(hash);
  }
  const auto blocks = static_cast<uint32_t>(hashes_.size() - before);
  if (blocks > 0) noted_.push_back({blocks, page_size, asked});
  while (hashes_.size() > kWaitingMax) catch_up();
}

// The sampling rate may have fallen since the access was noted.
bool ReuseCurve::catch_up() {
  if (noted_.empty()) return false;
  const Noted next = noted_.front();
  noted_.pop_front();
  const auto end = hashes_.begin() + next.blocks;
  if (next.asked) {  // as the order was before this access
    std::for_each(hashes_.begin(), end, [&](uint64_t hash) { measure(hash, next.page_size); });
  }
  for (auto at = end; at != hashes_.begin();) {
    const uint64_t hash = *--at;
    const bool news = next.asked || !sample_.contains(hash);
    if (is_sampled(hash) && news) touch(hash, next.page_size);
  }
  hashes_.erase(hashes_.begin(), end);
  return true;
}

// A block is asked for: its distance, if it is in the sample.
void ReuseCurve::measure(uint64_t hash, uint32_t page_size) {
  if (!is_sampled(hash)) return;
  const double weight = page_size / rate();
  seen_ += weight;
  const auto known = sample_.find(hash);
  if (known == sample_.end()) return;
  hits_[bucket_of(static_cast<double>(tokens_from(known->second.place)) / rate())] += weight;
  hit_tokens_ += weight;
}

double ReuseCurve::hit_rate(uint64_t capacity) const {
  if (tokens_ == 0 || seen_ == 0) return 0;
  double hits = hit_tokens_;
  if (capacity != kNoLimit) {
    const double step = std::log2(std::max(static_cast<double>(capacity), 1.0)) * kSteps;
    const auto whole = std::min(static_cast<uint32_t>(step), kBuckets - 1);
    hits = 0;
    for (uint32_t i = 0; i <= whole; ++i) hits += hits_[i];
    if (whole + 1 < kBuckets) hits += hits_[whole + 1] * (step - whole);
  }
  // A few blocks are asked for very often, and chance decides whether they are in the sample. So
  // what the sample saw too little of, or too much, is mostly theirs. They come back at short
  // distances: all of it counts as hits of every capacity.
  hits += static_cast<double>(asked_) - seen_;
  return std::clamp(hits, 0.0, static_cast<double>(asked_)) / static_cast<double>(tokens_);
}

uint64_t ReuseCurve::tokens_from(uint32_t place) const {
  uint64_t before = 0;
  for (uint32_t i = place; i > 0; i -= i & -i) before += order_[i];
  return sampled_tokens_ - before;
}

void ReuseCurve::change(uint32_t place, int64_t tokens) {
  sampled_tokens_ += tokens;
  for (uint32_t i = place + 1; i < order_.size(); i += i & -i) {
    order_[i] += static_cast<uint32_t>(tokens);
  }
}

// The block is the most recently used one.
void ReuseCurve::touch(uint64_t hash, uint32_t page_size) {
  if (next_place_ + 1 == order_.size()) pack();
  const auto [at, fresh] = sample_.try_emplace(hash, Block{next_place_, page_size});
  if (!fresh) {
    change(at->second.place, -int64_t{at->second.tokens});
    at->second = {next_place_, page_size};
  }
  change(next_place_++, page_size);
  if (sample_.size() > sample_max_) shrink();
}

// The block of the largest hash leaves the sample, and no block above that hash comes in again.
void ReuseCurve::shrink() {
  const auto last = std::prev(sample_.end());
  limit_ = last->first;
  change(last->second.place, -int64_t{last->second.tokens});
  sample_.erase(last);
}

// The same order, without the places that no block has any more.
void ReuseCurve::pack() {
  std::vector<Block*> blocks;
  for (auto& [hash, block] : sample_) blocks.push_back(&block);
  std::ranges::sort(blocks, {}, [](const Block* block) { return block->place; });
  std::ranges::fill(order_, 0);
  sampled_tokens_ = 0;
  next_place_ = 0;
  for (Block* block : blocks) {
    block->place = next_place_;
    change(next_place_++, block->tokens);
  }
}

size_t ReuseCurve::metadata_bytes() const {
  constexpr size_t kNode = sizeof(std::pair<const uint64_t, Block>) + 4 * sizeof(void*);
  return sizeof *this + order_.capacity() * sizeof(uint32_t) + sample_.size() * kNode +
         hashes_.size() * sizeof(uint64_t) + noted_.size() * sizeof(Noted);
}

void ReuseCurve::check() const {
  KVC2_CHECK(sample_.size() <= sample_max_, "%zu of %u blocks sampled", sample_.size(),
             sample_max_);
  uint64_t waiting = 0, tokens = 0;
  for (const Noted& each : noted_) waiting += each.blocks;
  KVC2_CHECK(waiting == hashes_.size() && waiting <= kWaitingMax, "%zu of %zu blocks are noted",
             static_cast<size_t>(waiting), hashes_.size());
  for (const auto& [hash, block] : sample_) {
    KVC2_CHECK(is_sampled(hash), "a block above the limit is sampled");
    KVC2_CHECK(block.place < next_place_, "place %u of %u", block.place, next_place_);
    tokens += block.tokens;
  }
  KVC2_CHECK(tokens == sampled_tokens_, "%zu tokens are sampled, the order has %zu",
             static_cast<size_t>(tokens), static_cast<size_t>(sampled_tokens_));
}

}  // namespace kvc2
