// The product with lanes along `in`: each output has a vector of its own, whose lanes are added at
// the end. The order of a sum depends on `in` alone. One token reads the weights as fast as memory
// gives them; many are bound by arithmetic, since what is loaded is used for several outputs.
//
// A `Dot` supplies:
//
//   Element, kTokens, kStepBytes      of x and w; of a panel; what it holds of a token and a step
//   widen(x, step)                    a step of a row (64 bytes of it) into a panel
//   multiply<kCount, kFetch>(rows, panel, outputs)
//       kCount tokens with these rows: each token's outputs as lanes, 0 for rows that aren't there.
//       Fetches as many bytes of those that are read next as these rows have.
#pragma once

#include <utility>

#include "experts/grouped.h"

namespace kvc2::experts {
namespace {

// A step is a cache line of a weight row.
template <class T>
constexpr size_t kStep = 64 / sizeof(T);

// Up to sixteen rows of a weight, one behind the other, and those that are read after them.
template <class T>
struct Sixteen {
  const T* first;
  size_t count, in;
  const T* next;

  // Beyond the last row it is the last one again.
  const T* row(size_t i) const { return first + std::min(i, count - 1) * in; }
};

// Of a few rows, what lies behind the whole steps, with zeros behind it.
template <class T, size_t kRows>
struct Tails {
  Tails(const T* const (&from)[kRows], size_t in) {
    const size_t whole = in / kStep<T> * kStep<T>;
    for (size_t r = 0; r < kRows; ++r) {
      std::memcpy(data[r], from[r] + whole, (in - whole) * sizeof(T));
      rows[r] = data[r];
    }
  }
  alignas(64) T data[kRows][kStep<T>] = {};
  const T* rows[kRows];
};

template <class Dot>
class RowsProduct {
 public:
  using Element = typename Dot::Element;
  using T = Element;
  static constexpr size_t kTokens = Dot::kTokens;

  RowsProduct(const Weight& weight, size_t in) : weight_(weight), in_(in) {}

  // A panel is [steps][kTokens][kStepBytes].
  size_t panel_bytes() const { return divided_up(in_, kStep<T>) * kTokens * Dot::kStepBytes; }

  void pack(const T* const (&rows)[kTokens], std::byte* panel) const {
    for (size_t k = 0; k < in_; k += kStep<T>) {
      const size_t count = std::min(kStep<T>, in_ - k);
      for (size_t t = 0; t < kTokens; ++t, panel += Dot::kStepBytes) {
        alignas(64) T step[kStep<T>] = {};
        if (rows[t] != nullptr) std::memcpy(step, rows[t] + k, count * sizeof(T));
        Dot::widen(step, panel);
      }
    }
  }

  WeightRows<T> rows(const Pick& pick) const { return {weight_, pick}; }

  class Multiplier {
   public:
    template <class Epilogue>
    void run(const WeightRows<T>& rows, const Panels& panels, const Epilogue& epilogue) {
      const size_t full = panels.tokens / kTokens, rest = panels.tokens % kTokens;
      // Later panels find the rows in the cache.
      if (full > 0) one<kTokens, true>(rows, panels, 0, epilogue);
      for (size_t p = 1; p < full; ++p) one<kTokens, false>(rows, panels, p, epilogue);
      if (rest > 0) some(rest, rows, panels, full, epilogue, std::make_index_sequence<kTokens>{});
    }

   private:
    // The last panel, whose `count` tokens are a number that the compiler is to know.
    template <class Epilogue, size_t... kCounts>
    static void some(size_t count, const WeightRows<T>& rows, const Panels& panels, size_t index,
                     const Epilogue& epilogue, std::index_sequence<kCounts...>) {
      const auto if_it_is = [&](auto known) {
        constexpr size_t kCount = decltype(known)::value;
        if constexpr (kCount > 0) {
          if (count != kCount) return;
          index == 0 ? one<kCount, true>(rows, panels, index, epilogue)
                     : one<kCount, false>(rows, panels, index, epilogue);
        }
      };
      (if_it_is(std::integral_constant<size_t, kCounts>{}), ...);
    }

    template <size_t kCount, bool kFetch, class Epilogue>
    static void one(const WeightRows<T>& rows, const Panels& panels, size_t index,
                    const Epilogue& epilogue) {
      Lanes first[kTokens] = {}, second[kTokens] = {};
      const std::byte* panel = panels.at(index);
      const Sixteen<T> low{rows.first, rows.first_count, rows.in, rows.second};
      Dot::template multiply<kCount, kFetch>(low, panel, first);
      if (rows.second_count > 0) {
        const T* next = rows.first + kLanes * rows.in;
        const Sixteen<T> high{rows.second, rows.second_count, rows.in, next};
        Dot::template multiply<kCount, kFetch>(high, panel, second);
      }
      epilogue(index, first, second);
    }
  };

 private:
  const Weight& weight_;
  const size_t in_;
};

// Reads memory before it is needed, into the second cache: rows whose distance is a power of two
// would drive each other out of the first. Lines one after the other, whatever the rows' distance:
// this is how memory is fastest.
template <size_t kRows, class T>
inline void fetch(const T* ahead, size_t step) {
  const auto* line = reinterpret_cast<const char*>(ahead) + step * kRows * 64;
#pragma GCC unroll 4
  for (size_t r = 0; r < kRows; ++r) __builtin_prefetch(line + r * 64, 0, 2);
}

}  // namespace
}  // namespace kvc2::experts
