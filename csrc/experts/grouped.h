// The shape that all instruction sets share. Tokens are packed into panels of sixteen, transposed,
// so that a lane is a token; a weight's rows then go through as they are stored, and each output
// row comes out as sixteen lanes. A `Product` supplies:
//
//   Element, panel_bytes(in)                     how a panel stores sixteen tokens
//   pack(rows, in, panel)                        sixteen rows (null: zeros) into a panel
//   pack_output(panel, index, outputs)           sixteen outputs as the next product's inputs
//   Multiplier                                   what a thread holds while it computes
//   multiplier.run(rows, in, panels, epilogue)   two times sixteen weight rows with each panel;
//                                                epilogue(panel, first[16], second[16])
//
// Costs: packing is tokens x in; a row of a weight is read from memory once for all its tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "base/lanes.h"
#include "experts/experts.h"

namespace kvc2::experts {
namespace {

// Two runs of weight rows of `in` elements each; counts up to sixteen.
template <class Element>
struct WeightRows {
  const Element* first;
  const Element* second;
  size_t first_count, second_count;
};

struct Panels {
  const std::byte* data;
  size_t count, bytes;  // bytes of one
  const std::byte* at(size_t i) const { return data + i * bytes; }
};

// So that each thread gets some four pieces: they may differ in cost.
inline size_t grain(size_t items, const ThreadTeam& team) {
  return std::max<size_t>(1, items / (4 * team.threads()));
}

inline size_t panels_of(size_t tokens) { return (tokens + kLanes - 1) / kLanes; }

// Sixteen outputs of sixteen tokens, transposed into the rows of a [tokens, stride] array.
template <class T>
inline void store_outputs(const Lanes (&outputs)[kLanes], size_t count, T* const (&rows)[kLanes],
                          size_t column) {
  Lanes by_token[kLanes];
  for (size_t i = 0; i < kLanes; ++i) by_token[i] = outputs[i];
  transpose(by_token);
  for (size_t t = 0; t < kLanes && rows[t] != nullptr; ++t) {
    if (count == kLanes) {
      store_from_floats(rows[t] + column, by_token[t]);
    } else {
      store_some(rows[t] + column, by_token[t], count);
    }
  }
}

template <class Product>
void linear(const Linear& call, Workspace& workspace) {
  using T = typename Product::Element;
  const auto* x = static_cast<const T*>(call.x);
  const auto* w = static_cast<const T*>(call.w);
  auto* y = static_cast<T*>(call.y);
  const size_t count = panels_of(call.tokens), bytes = Product::panel_bytes(call.in);
  auto* packed = static_cast<std::byte*>(workspace.scratch.reserve(count * bytes));
  workspace.team.parallel_for(count, grain(count, workspace.team), [&](size_t begin, size_t end) {
    for (size_t p = begin; p < end; ++p) {
      const T* rows[kLanes];
      for (size_t t = 0; t < kLanes; ++t) {
        const size_t token = p * kLanes + t;
        rows[t] = token < call.tokens ? x + token * call.in : nullptr;
      }
      Product::pack(rows, call.in, packed + p * bytes);
    }
  });
  const Panels panels{packed, count, bytes};
  const size_t blocks = (call.out + 2 * kLanes - 1) / (2 * kLanes);
  workspace.team.parallel_for(blocks, grain(blocks, workspace.team), [&](size_t begin, size_t end) {
    typename Product::Multiplier multiplier;
    for (size_t block = begin; block < end; ++block) {
      const size_t first = block * 2 * kLanes, second = std::min(first + kLanes, call.out);
      const WeightRows<T> rows{w + first * call.in, w + second * call.in, second - first,
                               std::min(call.out - second, kLanes)};
      multiplier.run(rows, call.in, panels, [&](size_t p, const auto& low, const auto& high) {
        T* targets[kLanes];
        for (size_t t = 0; t < kLanes; ++t) {
          const size_t token = p * kLanes + t;
          targets[t] = token < call.tokens ? y + token * call.out : nullptr;
        }
        store_outputs(low, rows.first_count, targets, first);
        if (rows.second_count > 0) store_outputs(high, rows.second_count, targets, second);
      });
    }
  });
}

// The (token, choice) slots in the order of their experts, cut into panels of one expert each.
struct Grouping {
  struct Panel {
    size_t begin, count;  // of `slots`
  };
  std::vector<size_t> slots;
  std::vector<Panel> panels;
  std::vector<size_t> first_panel;  // [experts + 1]
  std::vector<size_t> used;         // experts that have tokens

  explicit Grouping(const Ffn& call) : slots(call.tokens * call.chosen) {
    std::vector<size_t> next(call.experts + 1);
    for (size_t s = 0; s < slots.size(); ++s) ++next[static_cast<size_t>(call.expert_ids[s]) + 1];
    for (size_t e = 0; e < call.experts; ++e) {
      const size_t begin = next[e], end = begin + next[e + 1];
      first_panel.push_back(panels.size());
      for (size_t at = begin; at < end; at += kLanes) {
        panels.push_back({at, std::min(kLanes, end - at)});
      }
      if (begin < end) used.push_back(e);
      next[e + 1] = end;
    }
    first_panel.push_back(panels.size());
    for (size_t s = 0; s < slots.size(); ++s) {
      slots[next[static_cast<size_t>(call.expert_ids[s])]++] = s;
    }
  }
};

template <class Product>
class FfnRun {
 public:
  using T = typename Product::Element;

  FfnRun(const Ffn& call, Workspace& workspace)
      : call_(call), team_(workspace.team), groups_(call) {
    const size_t inputs = groups_.panels.size() * in_bytes_;
    const size_t hidden = groups_.panels.size() * hidden_bytes_;
    const size_t outputs = groups_.slots.size() * call.hidden * sizeof(float);
    inputs_ = static_cast<std::byte*>(workspace.scratch.reserve(inputs + hidden + outputs));
    hidden_ = inputs_ + inputs;
    outputs_ = reinterpret_cast<float*>(hidden_ + hidden);
  }

  void run() {
    pack_tokens();
    gate_and_up();
    down();
    combine();
  }

 private:
  Panels panels_of_expert(size_t expert, const std::byte* data, size_t bytes) const {
    const size_t first = groups_.first_panel[expert];
    return {data + first * bytes, groups_.first_panel[expert + 1] - first, bytes};
  }

  void pack_tokens() {
    const auto* x = static_cast<const T*>(call_.x);
    const size_t count = groups_.panels.size();
    team_.parallel_for(count, grain(count, team_), [&](size_t begin, size_t end) {
      for (size_t p = begin; p < end; ++p) {
        const auto [first, slots] = groups_.panels[p];
        const T* rows[kLanes] = {};
        for (size_t t = 0; t < slots; ++t) {
          rows[t] = x + groups_.slots[first + t] / call_.chosen * call_.hidden;
        }
        Product::pack(rows, call_.hidden, inputs_ + p * in_bytes_);
      }
    });
  }

  void gate_and_up() {
    const auto* w = static_cast<const T*>(call_.gate_up);
    const size_t blocks = (call_.size + kLanes - 1) / kLanes, items = groups_.used.size() * blocks;
    team_.parallel_for(items, grain(items, team_), [&](size_t begin, size_t end) {
      typename Product::Multiplier multiplier;
      for (size_t item = begin; item < end; ++item) {
        const size_t expert = groups_.used[item / blocks], row = item % blocks * kLanes;
        const size_t count = std::min(kLanes, call_.size - row);
        const T* gate = w + (2 * expert * call_.size + row) * call_.hidden;
        const WeightRows<T> rows{gate, gate + call_.size * call_.hidden, count, count};
        std::byte* hidden = hidden_ + groups_.first_panel[expert] * hidden_bytes_;
        multiplier.run(rows, call_.hidden, panels_of_expert(expert, inputs_, in_bytes_),
                       [&](size_t p, const auto& gates, const auto& ups) {
                         Lanes gated[kLanes];
                         for (size_t i = 0; i < kLanes; ++i) {
                           gated[i] = gates[i] / (1.0f + exponential(-gates[i])) * ups[i];
                         }
                         Product::pack_output(hidden + p * hidden_bytes_, row, gated, count);
                       });
      }
    });
  }

  void down() {
    const auto* w = static_cast<const T*>(call_.down);
    const size_t blocks = (call_.hidden + 2 * kLanes - 1) / (2 * kLanes);
    const size_t items = groups_.used.size() * blocks;
    team_.parallel_for(items, grain(items, team_), [&](size_t begin, size_t end) {
      typename Product::Multiplier multiplier;
      for (size_t item = begin; item < end; ++item) {
        const size_t expert = groups_.used[item / blocks], first = item % blocks * 2 * kLanes;
        const size_t second = std::min(first + kLanes, call_.hidden);
        const T* rows_at = w + (expert * call_.hidden + first) * call_.size;
        const WeightRows<T> rows{rows_at, rows_at + (second - first) * call_.size, second - first,
                                 std::min(call_.hidden - second, kLanes)};
        multiplier.run(rows, call_.size, panels_of_expert(expert, hidden_, hidden_bytes_),
                       [&](size_t p, const auto& low, const auto& high) {
                         const auto [at, slots] = groups_.panels[groups_.first_panel[expert] + p];
                         float* targets[kLanes] = {};
                         for (size_t t = 0; t < slots; ++t) {
                           targets[t] = outputs_ + groups_.slots[at + t] * call_.hidden;
                         }
                         store_outputs(low, rows.first_count, targets, first);
                         if (rows.second_count == 0) return;
                         store_outputs(high, rows.second_count, targets, second);
                       });
      }
    });
  }

  void combine() {
    auto* y = static_cast<T*>(call_.y);
    team_.parallel_for(call_.tokens, std::max<size_t>(8, grain(call_.tokens, team_)),
                       [&](size_t begin, size_t end) {
                         for (size_t t = begin; t < end; ++t) {
                           const float* slot = outputs_ + t * call_.chosen * call_.hidden;
                           sum_choices(slot, call_.weights + t * call_.chosen,
                                       y + t * call_.hidden);
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
  const Grouping groups_;
  const size_t in_bytes_ = Product::panel_bytes(call_.hidden);
  const size_t hidden_bytes_ = Product::panel_bytes(call_.size);
  std::byte* inputs_;
  std::byte* hidden_;
  float* outputs_;  // [slots, hidden]
};

template <class Product>
void ffn(const Ffn& call, Workspace& workspace) {
  FfnRun<Product>(call, workspace).run();
}

}  // namespace
}  // namespace kvc2::experts
