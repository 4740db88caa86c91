// The kernels of decoder.h in lanes, one source for every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/lanes.h"
#include "decoder/decoder.h"

namespace kvc2::decoder {
namespace {

inline Lanes rounded(Lanes x, const float*) { return x; }
inline Lanes rounded(Lanes x, const uint16_t*) { return reinterpret_cast<Lanes>(round_to_bf16(x)); }

// Calls body(at, count) for each sixteen of a row, and for what is left of it.
template <class Body>
inline void for_lanes(size_t size, const Body& body) {
  size_t at = 0;
  for (; at + kLanes <= size; at += kLanes) body(at, kLanes);
  if (at < size) body(at, size - at);
}

template <class T>
inline Lanes load_row(const T* from, size_t count) {
  return count == kLanes ? load_as_floats(from) : load_some(from, count);
}

template <class T>
inline void store_row(T* to, Lanes x, size_t count) {
  count == kLanes ? store_from_floats(to, x) : store_some(to, x, count);
}

// y = weight * x / rms; y may be x.
template <class T>
void norm_row(const T* x, const T* weight, size_t size, float eps, T* y) {
  Lanes squares = {};
  for_lanes(size, [&](size_t at, size_t count) {
    const Lanes v = load_row(x + at, count);
    squares += v * v;
  });
  const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  for_lanes(size, [&](size_t at, size_t count) {
    const Lanes normed = rounded(load_row(x + at, count) * scale, x);
    store_row(y + at, load_row(weight + at, count) * normed, count);
  });
}

template <class T>
void norm_rows(const Norm& call, size_t begin, size_t end) {
  for (size_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(call.x) + row * call.size;
    if (call.add != nullptr) {
      const T* add = static_cast<const T*>(call.add) + row * call.size;
      for_lanes(call.size, [&](size_t at, size_t count) {
        store_row(x + at, load_row(x + at, count) + load_row(add + at, count), count);
      });
    }
    norm_row(x, static_cast<const T*>(call.weight), call.size, call.eps,
             static_cast<T*>(call.y) + row * call.size);
  }
}

// to = from, turned by a position's angles: element i with element i + size / 2.
template <class T>
void rotate(const T* from, size_t size, const float* cosines, const float* sines, T* to) {
  const size_t half = size / 2;
  for_lanes(half, [&](size_t at, size_t count) {
    const Lanes first = load_row(from + at, count), second = load_row(from + half + at, count);
    const Lanes c = load_row(cosines + at, count), s = load_row(sines + at, count);
    store_row(to + at, first * c - second * s, count);
    store_row(to + half + at, second * c + first * s, count);
  });
}

template <class T>
void place_rows(const Place& call, size_t begin, size_t end) {
  const size_t size = call.pages.size, heads = call.pages.kv_heads;
  for (size_t token = begin; token < end; ++token) {
    T* from = const_cast<T*>(static_cast<const T*>(call.qkv)) +
              token * (call.query_heads + 2 * heads) * size;
    const size_t angle = static_cast<size_t>(call.positions[token]) * (size / 2);
    const auto turned = [&](T* head, const void* weight, T* to) {
      if (weight != nullptr) norm_row(head, static_cast<const T*>(weight), size, call.eps, head);
      rotate(head, size, call.cosines + angle, call.sines + angle, to);
    };
    T* query = static_cast<T*>(call.query) + token * call.query_heads * size;
    for (size_t head = 0; head < call.query_heads; ++head, from += size, query += size) {
      turned(from, call.query_weight, query);
    }
    const auto page = static_cast<size_t>(call.page_ids[token]);
    const auto offset = static_cast<size_t>(call.offsets[token]);
    for (size_t head = 0; head < heads; ++head, from += size) {
      const size_t slot = (page * heads + head) * call.pages.page_size + offset;
      turned(from, call.key_weight, static_cast<T*>(call.keys) + slot * size);
      std::memcpy(static_cast<T*>(call.values) + slot * size, from + heads * size,
                  size * sizeof(T));
    }
  }
}

constexpr float kNever = -3e38f;

inline float most(Lanes x) {
  float best = x[0];
  for (size_t i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// The first of the largest; what compares with nothing (NaN) is never larger.
inline size_t best_of(const float* values, size_t count) {
  Lanes best = broadcast(kNever);
  for (size_t at = 0; at < count; at += kLanes) best = maximum(load(values + at), best);
  const float highest = most(best);
  for (size_t i = 0; i < count; ++i) {
    if (values[i] == highest) return i;
  }
  return 0;
}

// One token's choice. Arrays are of whole lanes.
class Chooser {
 public:
  explicit Chooser(const Choice& call)
      : call_(call), lanes_((call.experts + kLanes - 1) / kLanes * kLanes) {}

  template <class T>
  void run(size_t token) {
    score(static_cast<const T*>(call_.logits) + token * call_.experts);
    select();
    int64_t* ids = call_.expert_ids + token * call_.chosen;
    float* weights = call_.weights + token * call_.chosen;
    float total = 0;
    for (size_t j = 0; j < call_.chosen; ++j) {
      const size_t best = next();
      ids[j] = static_cast<int64_t>(best);
      weights[j] = scores_[best];
      total += scores_[best];
    }
    const float all = call_.normalize ? total : 1.0f;
    for (size_t j = 0; j < call_.chosen; ++j) weights[j] = weights[j] / all * call_.scale;
  }

 private:
  // scores_, with what is behind the experts never chosen
  template <class T>
  void score(const T* logits) {
    Lanes best = broadcast(kNever);
    for_lanes(call_.experts, [&](size_t at, size_t count) {
      Lanes x = load_row(logits + at, count);
      if (call_.bias != nullptr) x += load_row(call_.bias + at, count);
      for (size_t i = count; i < kLanes; ++i) x[i] = kNever;
      store(scores_ + at, x);
      best = maximum(x, best);
    });
    if (call_.scoring == Scoring::kSigmoid) {
      const Lanes most_negative = broadcast(-80.0f);  // e^80 is as good as no end
      for (size_t at = 0; at < lanes_; at += kLanes) {
        const Lanes x = maximum(load(scores_ + at), most_negative);
        store(scores_ + at, 1.0f / (1.0f + exponential(-x)));
      }
      return;
    }
    const Lanes top = broadcast(most(best));
    Lanes total = {};
    for (size_t at = 0; at < lanes_; at += kLanes) {
      const Lanes e = exponential(load(scores_ + at) - top);
      total += e;
      store(scores_ + at, e);
    }
    const float all = sum(total);
    for (size_t at = 0; at < lanes_; at += kLanes) {
      store(scores_ + at, load(scores_ + at) / all);
    }
  }

  // wanted_: what the choice goes by
  void select() {
    for (size_t at = 0; at < lanes_; at += kLanes) {
      Lanes x = load(scores_ + at);
      if (call_.selection_bias != nullptr && at < call_.experts) {
        x += load_some(call_.selection_bias + at, std::min(kLanes, call_.experts - at));
      }
      store(wanted_ + at, x);
    }
    for (size_t i = 0; i < lanes_; ++i) {
      if (i >= call_.experts) wanted_[i] = kNever;
      if (i < call_.experts && !(wanted_[i] > kNever)) wanted_[i] = kNever / 2;  // NaN: chosen last
    }
    if (call_.chosen_groups < call_.groups) drop_groups();
  }

  void drop_groups() {
    const size_t size = call_.experts / call_.groups;
    float* worth = groups_;
    for (size_t g = 0; g < call_.groups; ++g) {
      float first = kNever, second = kNever;
      for (size_t i = g * size; i < (g + 1) * size; ++i) {
        const float x = wanted_[i];
        second = std::max(second, std::min(x, first));
        first = std::max(first, x);
      }
      const bool two = call_.selection_bias != nullptr && size > 1;
      worth[g] = two ? first + second : first;
    }
    bool kept[kMostExperts] = {};
    for (size_t n = 0; n < call_.chosen_groups; ++n) {
      size_t best = 0;
      bool found = false;
      for (size_t g = 0; g < call_.groups; ++g) {
        if (!kept[g] && (!found || worth[g] > worth[best])) best = g, found = true;
      }
      kept[best] = true;
    }
    for (size_t i = 0; i < call_.experts; ++i) {
      if (!kept[i / size]) wanted_[i] = kNever;
    }
  }

  // The best that is left, once.
  size_t next() {
    const size_t best = best_of(wanted_, lanes_);
    wanted_[best] = kNever;
    return best;
  }

  const Choice& call_;
  const size_t lanes_;
  alignas(64) float scores_[kMostExperts];
  alignas(64) float wanted_[kMostExperts];
  float groups_[kMostExperts];
};

void norm(const Norm& call, size_t begin, size_t end) {
  call.type == Type::kFloat32 ? norm_rows<float>(call, begin, end)
                              : norm_rows<uint16_t>(call, begin, end);
}

void place(const Place& call, size_t begin, size_t end) {
  call.type == Type::kFloat32 ? place_rows<float>(call, begin, end)
                              : place_rows<uint16_t>(call, begin, end);
}

void choose(const Choice& call, size_t begin, size_t end) {
  Chooser chooser(call);
  for (size_t token = begin; token < end; ++token) {
    call.type == Type::kFloat32 ? chooser.run<float>(token) : chooser.run<uint16_t>(token);
  }
}

constexpr Kernels kTheseKernels = {norm, place, choose};

}  // namespace
}  // namespace kvc2::decoder
