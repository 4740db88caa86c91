#include "decoder/sampler.h"

#include <xmmintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "base/lanes.h"

namespace kvc2::decoder {
namespace {

constexpr size_t kBlock = 16 * kLanes;  // weights that are added before they are looked at
constexpr size_t kBuckets = 2048;       // 11 bits of a key

// Rises with the logit; both zeros are one.
uint32_t key_of(float logit) {
  const float x = logit + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// The best tokens: those with a larger key, and of those with this one the ids up to `last`.
struct Cut {
  uint32_t key = 0;
  size_t last = SIZE_MAX;
  bool keeps(uint32_t other, size_t id) const {
    return (other > key) | ((other == key) & (id <= last));  // bits: no branch
  }
};

// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. 2011).
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    const auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
    counter = {high(b) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               high(a) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return counter;
}

double uniform(uint64_t seed, uint64_t position) {  // in [0, 1)
  const auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  const auto drawn =
      philox({low(position), low(position >> 32), 0, 0}, {low(seed), low(seed >> 32)});
  return static_cast<double>((uint64_t{drawn[1]} << 32 | drawn[0]) >> 11) * 0x1p-53;
}

// The larger lanes of both; where x is NaN, `strange` gets bits.
inline Lanes larger(Lanes x, Lanes best, Register& strange) {
  return by_registers(
      [&](Register a, Register b) {
        strange = _mm_or_ps(strange, _mm_cmpunord_ps(a, a));
        return Register{_mm_max_ps(a, b)};
      },
      x, best);
}

// One row, in a thread's memory. Blocks that a cut leaves nothing of are passed over.
class Row {
 public:
  static size_t bytes(size_t vocabulary) {
    const size_t block =
        kBlock * (sizeof(float) + sizeof(uint32_t)) + sizeof(double) + sizeof(float);
    return kCopies * kBuckets * sizeof(double) + blocks(vocabulary) * block;
  }

  Row(std::byte* memory, const float* logits, size_t vocabulary)
      : logits_(logits),
        vocabulary_(vocabulary),
        blocks_(blocks(vocabulary)),
        buckets_(reinterpret_cast<double*>(memory)),
        sums_(buckets_ + kCopies * kBuckets),
        weights_(reinterpret_cast<float*>(sums_ + blocks_)),
        ids_(reinterpret_cast<uint32_t*>(weights_ + blocks_ * kBlock)),
        best_of_(reinterpret_cast<float*>(ids_ + blocks_ * kBlock)) {}

  int64_t choose(const Sampling& how) {
    if (!find_best()) return kNoToken;
    if (how.temperature == 0) return first_best();
    if (how.top_k > 0 && how.top_k < vocabulary_) {
      cut_ = at_least(how.top_k);
      const auto count = static_cast<double>(how.top_k);
      cut_ = best_ones([](size_t) { return 1.0; }, [=](double) { return count; });
    }
    weigh(how.temperature);
    if (how.top_p < 1) cut_ = most(how.temperature, how.top_p);
    if (cut_.key > 0 || how.min_p > 0) drop(how.min_p);
    return draw(uniform(how.seed, how.position));
  }

 private:
  // Of a histogram: one bucket gets most of a row's weights, and each waits for the one before.
  static constexpr size_t kCopies = 4;

  static size_t blocks(size_t vocabulary) { return (vocabulary + kBlock - 1) / kBlock; }

  // False: no token of the row means anything.
  bool find_best() {
    Register strange = {};
    for (size_t b = 0; b < blocks_; ++b) {
      Lanes best = broadcast(-INFINITY);
      for (size_t i = b * kBlock; i < end_of(b); i += kLanes) {
        best = larger(at(i), best, strange);
      }
      float lanes[kLanes];
      store(lanes, best);
      best_of_[b] = *std::max_element(lanes, lanes + kLanes);
    }
    best_ = *std::max_element(best_of_, best_of_ + blocks_);
    if (_mm_movemask_ps(strange) != 0) return false;
    return std::isfinite(best_);
  }

  int64_t first_best() const {
    const auto block =
        static_cast<size_t>(std::find(best_of_, best_of_ + blocks_, best_) - best_of_);
    return std::find(logits_ + block * kBlock, logits_ + vocabulary_, best_) - logits_;
  }

  size_t end_of(size_t block) const { return std::min((block + 1) * kBlock, vocabulary_); }

  // Sixteen logits from i on; there are none behind the last.
  Lanes at(size_t i) const {
    if (i + kLanes <= vocabulary_) return load(logits_ + i);
    float some[kLanes];
    std::fill_n(some, kLanes, -INFINITY);
    std::copy(logits_ + i, logits_ + vocabulary_, some);
    return load(some);
  }

  // Calls body(block) for each that has tokens within the cut.
  template <class Body>
  void for_blocks(const Body& body) const {
    for (size_t b = 0; b < blocks_; ++b) {
      if (key_of(best_of_[b]) >= cut_.key) body(b);
    }
  }

  // The ids within the cut, in order; returns how many. Without a branch that nobody can predict.
  size_t gather() {
    size_t count = 0;
    for_blocks([&](size_t b) {
      for (size_t i = b * kBlock; i < end_of(b); ++i) {
        ids_[count] = static_cast<uint32_t>(i);
        count += cut_.keeps(key_of(logits_[i]), i) ? 1 : 0;
      }
    });
    return count;
  }

  // A cut with so many tokens or more: as many blocks have a best one that is in it.
  Cut at_least(size_t count) {
    if (count > blocks_) return {};
    auto* bests = weights_;  // which nobody needs yet
    std::copy_n(best_of_, blocks_, bests);
    std::nth_element(bests, bests + count - 1, bests + blocks_, std::greater<>());
    return {key_of(bests[count - 1]), SIZE_MAX};
  }

  // Probabilities beside the best's, whose weight is 1.
  void weigh(float temperature) {
    const float inverse = 1 / temperature;
    for_blocks([&](size_t b) {
      for (size_t i = b * kBlock; i < (b + 1) * kBlock; i += kLanes) {
        const Lanes x = i < vocabulary_ ? at(i) : broadcast(-INFINITY);
        store(weights_ + i, exponential((x - best_) * inverse));
      }
    });
  }

  // The fewest best ones whose weights are this share of all within the cut.
  Cut most(float temperature, double share) {
    const auto weight_of = [this](size_t i) { return double{weights_[i]}; };
    if (cut_.key > 0) return best_ones(weight_of, [=](double all) { return share * all; });
    // What weighs less than `least` is together less than the others leave, so is not among the
    // best; half of that, since weights are rounded.
    const double all = add_blocks(), wanted = share * all;
    const double least = (all - wanted) / static_cast<double>(vocabulary_) / 2;
    cut_ = {key_of(static_cast<float>(best_ + temperature * std::log(least))), SIZE_MAX};
    return best_ones(weight_of, [=](double) { return wanted; });
  }

  // Weights of those that are out become 0.
  void drop(float min_p) {
    for_blocks([&](size_t b) {
      for (size_t i = b * kBlock; i < end_of(b); ++i) {
        const bool stays = weights_[i] >= min_p && cut_.keeps(key_of(logits_[i]), i);
        weights_[i] = stays ? weights_[i] : 0;
      }
    });
  }

  // The fewest best ones within the cut whose weights reach `wanted`, of the sum of all of them.
  // Looks for the key of the last one from its upper bits on.
  template <class WeightOf, class Wanted>
  Cut best_ones(const WeightOf& weight_of, const Wanted& wanted) {
    size_t count = gather();
    double missing = wanted(fill_buckets(count, 21, weight_of));
    count = those_in_last_bucket(count, 21, missing);
    for (const int shift : {10, 0}) {
      fill_buckets(count, shift, weight_of);
      count = those_in_last_bucket(count, shift, missing);
    }
    size_t last = 0;  // of equal ones
    while (last + 1 < count && (missing -= weight_of(ids_[last])) > 0) ++last;
    return {key_of(logits_[ids_[last]]), ids_[last]};
  }

  // Some bits of a token's key. What is above them is the same for all candidates.
  size_t bits_of(size_t id, int shift) const {
    return key_of(logits_[id]) >> shift & (kBuckets - 1);
  }

  // With weights by some bits of the keys of so many candidates; returns the sum of all.
  template <class WeightOf>
  double fill_buckets(size_t count, int shift, const WeightOf& weight_of) {
    std::fill_n(buckets_, kCopies * kBuckets, 0.0);
    for (size_t j = 0; j < count; ++j) {
      buckets_[j % kCopies * kBuckets + bits_of(ids_[j], shift)] += weight_of(ids_[j]);
    }
    double all = 0;
    for (size_t b = 0; b < kBuckets; ++b) {
      for (size_t copy = 1; copy < kCopies; ++copy) buckets_[b] += buckets_[copy * kBuckets + b];
      all += buckets_[b];
    }
    return all;
  }

  // Leaves those of so many candidates; returns how many they are.
  size_t those_in_last_bucket(size_t count, int shift, double& missing) {
    const size_t wanted = last_bucket(missing);
    size_t left = 0;
    for (size_t j = 0; j < count; ++j) {
      const uint32_t id = ids_[j];
      ids_[left] = id;
      left += bits_of(id, shift) == wanted ? 1 : 0;
    }
    return left;
  }

  // The bucket in which the weights from the top reach what is missing, or the last with any; what
  // is missing is then what it has to give.
  size_t last_bucket(double& missing) const {
    size_t found = 0;
    double given = 0;
    for (size_t b = kBuckets; b-- > 0;) {
      if (buckets_[b] == 0) continue;
      missing -= given;
      given = buckets_[b], found = b;
      if (given >= missing) break;
    }
    return found;
  }

  // Of the weights; returns the sum of all.
  double add_blocks() {
    double all = 0;
    for_blocks([&](size_t b) {
      Lanes block = {};
      for (size_t i = 0; i < kBlock; i += kLanes) block += load(weights_ + b * kBlock + i);
      all += sums_[b] = double{sum(block)};
    });
    return all;
  }

  // The first token up to which the weights are more than this share of all.
  int64_t draw(double share) {
    double left = share * add_blocks();
    size_t block = 0, last = 0;
    bool found = false;
    for_blocks([&](size_t b) {
      if (found || sums_[b] == 0) return;
      block = b;
      found = left < sums_[b];
      if (!found) left -= sums_[b];
    });
    for (size_t i = block * kBlock; i < end_of(block); ++i) {
      if (weights_[i] == 0) continue;
      last = i;
      if (left < weights_[i]) break;
      left -= weights_[i];
    }
    return static_cast<int64_t>(last);
  }

  const float* logits_;
  const size_t vocabulary_, blocks_;
  double* buckets_;  // [copies][buckets]
  double* sums_;     // of blocks of weights
  float* weights_;   // 0 behind the last
  uint32_t* ids_;
  float* best_of_;  // blocks
  float best_ = 0;
  Cut cut_;
};

}  // namespace

void sample(const Sample& call, Workspace& workspace) {
  const size_t bytes = (Row::bytes(call.vocabulary) + 63) / 64 * 64;
  auto* memory =
      static_cast<std::byte*>(workspace.scratch.reserve(bytes * workspace.team.threads()));
  workspace.team.parallel_for(call.rows, 1, [&](size_t begin, size_t end, size_t thread) {
    for (size_t r = begin; r < end; ++r) {
      const float* logits = call.logits + static_cast<size_t>(call.row_ids[r]) * call.vocabulary;
      call.tokens[r] = Row(memory + thread * bytes, logits, call.vocabulary).choose(call.how[r]);
    }
  });
}

}  // namespace kvc2::decoder
