// The shape that all instruction sets share. Token rows are packed into panels, in the form that
// the product wants; a weight's rows then go through as they are stored, sixteen at a time, and
// each token of a panel gets sixteen outputs as lanes. A `Product` of (weight, in) supplies:
//
//   Element                                  of x and y
//   kTokens, panel_bytes()                   of a panel
//   pack(rows, panel)                        kTokens rows (null: zeros) into a panel
//   rows(pick)                               two runs of weight rows, for `run`
//   Multiplier                               what a thread holds while it computes
//   multiplier.run(rows, panels, epilogue)   these rows with each panel;
//                                            epilogue(panel, first[kTokens], second[kTokens])
//
// Costs: packing is tokens x in; a row of a weight is read from memory once for as many tokens as
// the second cache holds panels of.
#pragma once

#include <algorithm>
#include <cstddef>

#include "base/lanes.h"
#include "experts/experts.h"
#include "experts/grouping.h"

namespace kvc2::experts {
namespace {

// Where sixteen rows begin: of a part of a weight (gate or up), or of its only one.
struct Place {
  size_t part, row;
};

// Two runs of up to sixteen rows of one matrix of a weight; the second may have none.
struct Pick {
  size_t matrix;           // of all that the weight has
  size_t parts, rows, in;  // parts of a matrix, rows of a part
  Place first, second;
  size_t first_count, second_count;
};

// The same of a plain weight: rows of `in` elements.
template <class Element>
struct WeightRows {
  WeightRows(const Weight& weight, const Pick& pick)
      : in(pick.in), first_count(pick.first_count), second_count(pick.second_count) {
    const auto* all = reinterpret_cast<const Element*>(weight.data);
    const auto at = [&](const Place& place) {
      return all + ((pick.matrix * pick.parts + place.part) * pick.rows + place.row) * in;
    };
    first = at(pick.first), second = at(pick.second);
  }
  const Element* first;
  const Element* second;
  size_t in, first_count, second_count;
};

// Consecutive panels: all are full but the last.
struct Panels {
  const std::byte* data;
  size_t tokens, bytes;  // of all, of one
  const std::byte* at(size_t i) const { return data + i * bytes; }
};

// Each thread gets several pieces: they may differ in cost. More pieces would cost the stream of
// weights, which begins anew with each.
inline size_t grain(size_t items, const ThreadTeam& team) {
  return std::max<size_t>(1, items / (16 * team.threads()));
}

// Waking a thread costs as much as packing this much.
constexpr size_t kPackedBytes = 128 * 1024;

inline size_t packing_grain(size_t panels, size_t panel_bytes, const ThreadTeam& team) {
  return std::max(grain(panels, team), kPackedBytes / panel_bytes + 1);
}

inline size_t divided_up(size_t a, size_t b) { return (a + b - 1) / b; }

// Panels that stay in the second cache while all rows of a weight go by.
constexpr size_t kCachedBytes = 1 << 20;

inline size_t panels_at_once(size_t panel_bytes) {
  return std::max<size_t>(2, kCachedBytes / std::max<size_t>(1, panel_bytes) / 2 * 2);
}

// Up to 32 rows of a matrix of one part, from `first` on.
inline Pick next_rows(size_t matrix, size_t rows, size_t in, size_t first) {
  const size_t second = std::min(first + kLanes, rows);
  const size_t rest = std::min(rows - second, kLanes);
  return {matrix, 1, rows, in, {0, first}, {0, second}, second - first, rest};
}

// An expert's row of biases, where there are any.
inline const float* bias_of(const float* biases, size_t expert, size_t size) {
  return biases == nullptr ? nullptr : biases + expert * size;
}

inline void add_some(float* to, const float* from, size_t count) {
  store_some(to, load_some(to, count) + load_some(from, count), count);
}

// e^x is computed up to 88, and what comes behind e^80 is nothing beside it.
inline Lanes bounded_exponential(Lanes x) {
  const Lanes most = broadcast(80.0f);
  return exponential(x < most ? x : most);
}

inline Lanes gated(const Gating& how, Lanes gate, Lanes up) {
  const Lanes most = broadcast(how.limit);
  gate = most < gate ? most : gate;
  up = most < up ? most : up;
  up = up < -most ? -most : up;
  if (how.offset != 0) up += how.offset;
  if (how.activation == Activation::kSilu) {
    return gate / (1.0f + bounded_exponential(-gate * how.alpha)) * up;
  }
  // (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
  const Lanes u = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
  return gate / (1.0f + bounded_exponential(-2.0f * u)) * up;
}

template <class Product>
class LinearRun {
 public:
  using T = typename Product::Element;

  LinearRun(const Linear& call, Workspace& workspace)
      : call_(call),
        team_(workspace.team),
        product_(call.w, call.in),
        packed_(static_cast<std::byte*>(workspace.scratch.reserve(panels_ * bytes_))) {}

  void run() {
    pack();
    const size_t blocks = divided_up(call_.out, 2 * kLanes);
    const size_t items = divided_up(panels_, at_once_) * blocks;
    team_.parallel_for(items, grain(items, team_), [&](size_t begin, size_t end) {
      typename Product::Multiplier multiplier;
      for (size_t item = begin; item < end; ++item) {
        multiply(multiplier, item / blocks * at_once_, item % blocks * 2 * kLanes);
      }
    });
  }

 private:
  size_t count(size_t panel) const {
    return std::min(Product::kTokens, call_.tokens - panel * Product::kTokens);
  }

  void pack() {
    const auto* x = static_cast<const T*>(call_.x);
    const size_t pieces = packing_grain(panels_, bytes_, team_);
    team_.parallel_for(panels_, pieces, [&](size_t begin, size_t end) {
      for (size_t p = begin; p < end; ++p) {
        const T* rows[Product::kTokens] = {};
        for (size_t t = 0; t < count(p); ++t) rows[t] = x + (p * Product::kTokens + t) * call_.in;
        product_.pack(rows, packed_ + p * bytes_);
      }
    });
  }

  // Up to at_once_ panels with up to 32 rows.
  void multiply(typename Product::Multiplier& multiplier, size_t first_panel, size_t first_row) {
    const Pick pick = next_rows(0, call_.out, call_.in, first_row);
    const size_t before = first_panel * Product::kTokens;
    const size_t tokens = std::min(at_once_ * Product::kTokens, call_.tokens - before);
    const Panels panels{packed_ + first_panel * bytes_, tokens, bytes_};
    multiplier.run(product_.rows(pick), panels, [&](size_t i, const auto& low, const auto& high) {
      const size_t p = first_panel + i;
      T* y = static_cast<T*>(call_.y) + p * Product::kTokens * call_.out;
      for (size_t t = 0; t < count(p); ++t, y += call_.out) {
        store_some(y + pick.first.row, low[t], pick.first_count);
        store_some(y + pick.second.row, high[t], pick.second_count);
      }
    });
  }

  const Linear& call_;
  ThreadTeam& team_;
  const Product product_;
  const size_t panels_ = divided_up(call_.tokens, Product::kTokens);
  const size_t bytes_ = product_.panel_bytes();
  const size_t at_once_ = panels_at_once(bytes_);
  std::byte* packed_;
};

template <class Product>
class FfnRun {
 public:
  using T = typename Product::Element;

  FfnRun(const Ffn& call, Workspace& workspace)
      : call_(call),
        team_(workspace.team),
        gate_up_(call.gate_up, call.hidden),
        down_(call.down, call.size),
        groups_(call, Product::kTokens,
                Product::kTokens * panels_at_once(Product::kTokens * call.hidden * sizeof(T))) {
    const size_t inputs = groups_.num_panels * in_bytes_;
    const size_t packed = groups_.num_panels * hidden_bytes_;
    const size_t choices = call.outputs == nullptr ? call.tokens * call.chosen : 0;
    const size_t outputs = choices * call.hidden * sizeof(float);
    const size_t hidden = groups_.num_slots * call.size * sizeof(T);
    auto* memory = workspace.scratch.reserve(inputs + packed + outputs + hidden);
    inputs_ = static_cast<std::byte*>(memory);
    packed_hidden_ = inputs_ + inputs;
    outputs_ = call.outputs;
    if (outputs_ == nullptr) outputs_ = reinterpret_cast<float*>(packed_hidden_ + packed);
    hidden_ = reinterpret_cast<T*>(packed_hidden_ + packed + outputs);
  }

  void run() {
    if (groups_.num_slots > 0) compute_choices();
    if (call_.y != nullptr) combine();
  }

 private:
  void compute_choices() {
    const auto* x = static_cast<const T*>(call_.x);
    pack(gate_up_, inputs_, in_bytes_,
         [&](size_t place) { return x + groups_.slots[place] / call_.chosen * call_.hidden; });
    gate_and_up();
    pack(down_, packed_hidden_, hidden_bytes_,
         [&](size_t place) { return hidden_ + place * call_.size; });
    down();
  }

  // The panels of all experts, from the row of each place.
  template <class RowOf>
  void pack(const Product& product, std::byte* data, size_t bytes, const RowOf& row_of) {
    const size_t pieces = packing_grain(groups_.num_panels, bytes, team_);
    team_.parallel_for(groups_.num_panels, pieces, [&](size_t begin, size_t end) {
      for (size_t p = begin; p < end; ++p) {
        const auto [first, count] = groups_.panels[p];
        const T* rows[Product::kTokens] = {};
        for (size_t t = 0; t < count; ++t) rows[t] = row_of(first + t);
        product.pack(rows, data + p * bytes);
      }
    });
  }

  // Calls body(multiplier, share, block) for each block of each expert that has tokens.
  template <class Body>
  void for_blocks(size_t blocks, const Body& body) {
    const size_t items = groups_.num_shares * blocks;
    team_.parallel_for(items, grain(items, team_), [&](size_t begin, size_t end) {
      typename Product::Multiplier multiplier;
      for (size_t item = begin; item < end; ++item) {
        body(multiplier, groups_.shares[item / blocks], item % blocks);
      }
    });
  }

  void gate_and_up() {
    for_blocks(divided_up(call_.size, kLanes), [&](auto& multiplier, const auto& share, size_t b) {
      const size_t row = b * kLanes, count = std::min(kLanes, call_.size - row);
      const Pick pick{share.expert, 2, call_.size, call_.hidden, {0, row}, {1, row}, count, count};
      const float* biases = bias_of(call_.gate_up_bias, share.expert, 2 * call_.size);
      const Panels panels{inputs_ + share.first_panel * in_bytes_, share.count, in_bytes_};
      const auto rows = gate_up_.rows(pick);
      multiplier.run(rows, panels, [&](size_t p, const auto& gates, const auto& ups) {
        const Grouping::Panel& panel = groups_.panels[share.first_panel + p];
        for (size_t t = 0; t < panel.count; ++t) {
          Lanes gate = gates[t], up = ups[t];
          if (biases != nullptr) {
            gate += load_some(biases + row, count);
            up += load_some(biases + call_.size + row, count);
          }
          store_some(hidden_ + (panel.begin + t) * call_.size + row, gated(call_.gating, gate, up),
                     count);
        }
      });
    });
  }

  void down() {
    const size_t blocks = divided_up(call_.hidden, 2 * kLanes);
    for_blocks(blocks, [&](auto& multiplier, const auto& share, size_t b) {
      const Pick pick = next_rows(share.expert, call_.hidden, call_.size, b * 2 * kLanes);
      const float* bias = bias_of(call_.down_bias, share.expert, call_.hidden);
      const Panels panels{packed_hidden_ + share.first_panel * hidden_bytes_, share.count,
                          hidden_bytes_};
      multiplier.run(down_.rows(pick), panels, [&](size_t p, const auto& low, const auto& high) {
        const Grouping::Panel& panel = groups_.panels[share.first_panel + p];
        for (size_t t = 0; t < panel.count; ++t) {
          float* y = outputs_ + groups_.slots[panel.begin + t] * call_.hidden;
          store_some(y + pick.first.row, low[t], pick.first_count);
          store_some(y + pick.second.row, high[t], pick.second_count);
          if (bias != nullptr) {
            add_some(y + pick.first.row, bias + pick.first.row, pick.first_count);
            add_some(y + pick.second.row, bias + pick.second.row, pick.second_count);
          }
        }
      });
    });
  }

  void combine() {
    auto* y = static_cast<T*>(call_.y);
    const size_t tokens = std::max<size_t>(8, grain(call_.tokens, team_));
    team_.parallel_for(call_.tokens, tokens, [&](size_t begin, size_t end) {
      for (size_t t = begin; t < end; ++t) {
        const float* slot = outputs_ + t * call_.chosen * call_.hidden;
        sum_choices(slot, call_.weights + t * call_.chosen, y + t * call_.hidden);
      }
    });
  }

  void sum_choices(const float* slots, const float* weights, T* y) const {
    for (size_t column = 0; column < call_.hidden; column += kLanes) {
      const size_t count = std::min(kLanes, call_.hidden - column);
      Lanes total = {};
      for (size_t j = 0; j < call_.chosen; ++j) {
        total += load_some(slots + j * call_.hidden + column, count) * weights[j];
      }
      store_some(y + column, total, count);
    }
  }

  const Ffn& call_;
  ThreadTeam& team_;
  const Product gate_up_, down_;
  const Grouping groups_;
  const size_t in_bytes_ = groups_.num_slots > 0 ? gate_up_.panel_bytes() : 0;
  const size_t hidden_bytes_ = groups_.num_slots > 0 ? down_.panel_bytes() : 0;
  std::byte* inputs_;         // panels of x, expert by expert
  std::byte* packed_hidden_;  // panels of hidden_
  float* outputs_;            // [tokens, chosen, hidden]
  T* hidden_;                 // [slots, size], in the order of the experts
};

template <class Product>
void linear(const Linear& call, Workspace& workspace) {
  LinearRun<Product>(call, workspace).run();
}

template <class Product>
void ffn(const Ffn& call, Workspace& workspace) {
  FfnRun<Product>(call, workspace).run();
}

}  // namespace
}  // namespace kvc2::experts
