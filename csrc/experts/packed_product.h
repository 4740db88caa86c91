// The product with quantised weights: a lane is a row of sixteen, a token's inputs are broadcast,
// and lines of weights stream in as they are stored.
//
// Of integers (int8, int4) the inputs are quantised too, to -127...127 with a scale for each token
// and group of the weight. Sums of integers are exact, in any order; each group's is scaled and
// added in float32, group after group. Of fp8 the inputs stay as they are. So a result depends on
// its token and its row alone, whatever stands beside it, as it must.
//
// A file for an instruction set supplies types for bytes, nibbles and fp8, each with
//
//   kBytes                   of its registers; a line, sixteen rows, is 64 / kBytes parts
//   kStepBytes, put(x, at)   what a panel holds of four inputs of one token: quantised, or elements
//   Split, split(words)      a part of a line as its products want it
//   Input, input(at)         four inputs, for each row
//   Sums, add(sums, w, x)    four products more for each row
//
// and for integers kSteps, how many fours Sums can take, and widened(sums), an int32 for each row;
// for fp8 kScale, which makes its sums what they should be.
#pragma once

#include <utility>

#include "experts/grouped.h"
#include "experts/packed.h"

namespace kvc2::experts {
namespace {

// Two blocks of sixteen rows; the second is the first again where there is none.
struct PackedRows {
  const PackedHead* head;
  const std::byte* lines[2];
  const std::byte* scales[2];
  const std::byte* zeros[2];  // null: none
  size_t first_count, second_count;
};

// Registers of kBytes, as float, int32 and their bits.
template <size_t kBytes>
struct Registers {
  typedef float Floats __attribute__((vector_size(kBytes)));  // `using` drops a dependent size
  typedef int32_t Ints __attribute__((vector_size(kBytes)));
  typedef uint32_t Words __attribute__((vector_size(kBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  typedef uint8_t Bytes __attribute__((vector_size(kBytes / 4)));
  static constexpr size_t kParts = 64 / kBytes;
  static constexpr size_t kRowsOfPart = kBytes / 4;

  template <class Narrow>
  static Narrow load(const std::byte* from) {
    Narrow x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
};

// Fours of inputs, to the end of the last line.
inline size_t steps_of(const PackedHead& head) { return head.lines() * head.values_a_line() / 4; }

// To the nearest integer, ties to even: adding 1.5 * 2^23 (0x4b400000) leaves no fraction.
inline IntLanes rounded(Lanes x) {
  return reinterpret_cast<IntLanes>(x + 12582912.0f) - 0x4b400000;
}

// Up to sixteen inputs from k on, before `to` and before the row's end; then zeros.
template <class T>
Lanes inputs_before(size_t to, const T* row, size_t in, size_t k) {
  const size_t end = std::min(to, in);
  if (k + kLanes <= end) return load_as_floats(row + k);
  return k < end ? load_some(row + k, end - k) : Lanes{};
}

// A token's inputs as integers: put_four(group, its how manieth four, four of them), and of each
// group put_group(group, scale, sum of its integers). A scale is that of the group's largest input
// to 127. A NaN or an infinity makes it one, and so all of its token's outputs.
template <class T, class PutFour, class PutGroup>
void quantise_row(const PackedHead& head, const T* row, const PutFour& put_four,
                  const PutGroup& put_group) {
  const size_t all = steps_of(head) * 4;
  for (size_t g = 0; g < head.groups(); ++g) {
    const size_t from = g * head.group, to = std::min<size_t>(from + head.group, all);
    IntLanes most = {};  // bits of magnitudes are ordered as they are, and NaN above all
    for (size_t k = from; k < to; k += kLanes) {
      const Lanes x = inputs_before(to, row, head.in, k);
      const auto bits = reinterpret_cast<IntLanes>(x) & 0x7fffffff;
      most = most > bits ? most : bits;
    }
    int32_t largest = 0;
    for (size_t i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
    float magnitude;
    std::memcpy(&magnitude, &largest, sizeof magnitude);
    const float inverse = magnitude > 0 ? 127.0f / magnitude : 0.0f;
    IntLanes sums = {};
    for (size_t k = from; k < to; k += kLanes) {
      const IntLanes q = rounded(inputs_before(to, row, head.in, k) * inverse);
      sums += q;
      using ByteLanes = int8_t __attribute__((vector_size(16)));
      const ByteLanes bytes = __builtin_convertvector(q, ByteLanes);
      int8_t fours[kLanes];
      std::memcpy(fours, &bytes, sizeof bytes);
      for (size_t i = 0; i < std::min(kLanes, to - k); i += 4) {
        put_four(g, (k - from + i) / 4, fours + i);
      }
    }
    int32_t sum_of_all = 0;
    for (size_t i = 0; i < kLanes; ++i) sum_of_all += sums[i];
    put_group(g, magnitude / 127.0f, sum_of_all);
  }
}

// Where the lines, scales and zero points lie of the rows that a product is asked for.
inline PackedRows packed_rows(const Weight& weight, const Pick& pick) {
  const PackedHead& head = *weight.head;
  const std::byte* record = weight.data + pick.matrix * weight.record_bytes;
  PackedRows found{&head, {}, {}, {}, pick.first_count, pick.second_count};
  for (size_t i = 0; i < 2; ++i) {
    const Place& place = i == 1 && pick.second_count > 0 ? pick.second : pick.first;
    const size_t block = place.part * head.blocks() + place.row / kLanes;
    const size_t scale = block * head.groups() * kLanes;
    found.lines[i] = record + head.values_at() + block * head.lines() * 64;
    found.scales[i] = record + head.scales_at() + scale * head.scale_bytes();
    if (head.has_zeros) found.zeros[i] = record + head.zeros_at() + scale;
  }
  return found;
}

// kTokensNow inputs and kBlocks blocks of sixteen rows at once: as many sums as registers hold.
template <class T, class Bytes, class Nibbles, class Fp8, size_t kTokensNow, size_t kBlocks>
class PackedProduct {
 public:
  using Element = T;
  static constexpr size_t kTokens = kTokensNow;

  PackedProduct(const Weight& weight, size_t) : weight_(weight), head_(*weight.head) {}

  // Of integers [groups][tokens] scales, and sums of the group's integers; then, of all, the
  // inputs, [steps of four][tokens].
  size_t panel_bytes() const {
    return inputs_at() + PackedHead::whole_lines(steps() * kTokens * step_bytes());
  }

  void pack(const T* const (&rows)[kTokens], std::byte* panel) const {
    for (size_t t = 0; t < kTokens; ++t) {
      if (rows[t] == nullptr) continue;  // nobody's: its sums are dropped
      if (head_.format == Format::kInt8) quantise<Bytes>(rows[t], t, panel);
      if (head_.format == Format::kInt4) quantise<Nibbles>(rows[t], t, panel);
      if (head_.format == Format::kFp8) put_all(rows[t], t, panel);
    }
  }

  PackedRows rows(const Pick& pick) const { return packed_rows(weight_, pick); }

  class Multiplier {
   public:
    template <class Epilogue>
    void run(const PackedRows& rows, const Panels& panels, const Epilogue& epilogue) {
      for (size_t p = 0; p * kTokens < panels.tokens; ++p) {
        const size_t count = std::min(kTokens, panels.tokens - p * kTokens);
        multiply(rows, count, panels.at(p), std::make_index_sequence<kTokens>{});
        epilogue(p, sums_[0], sums_[1]);
      }
    }

   private:
    // With as many tokens as there are.
    template <size_t... kBelow>
    void multiply(const PackedRows& rows, size_t count, const std::byte* panel,
                  std::index_sequence<kBelow...>) {
      ((count == kBelow + 1 ? by_format<kBelow + 1>(rows, panel) : void()), ...);
    }

    template <size_t kCount>
    void by_format(const PackedRows& rows, const std::byte* panel) {
      for (size_t block = 0; block < 2; block += kBlocks) {
        switch (rows.head->format) {
          case Format::kInt8:
            integers<Bytes, kCount, false>(rows, panel, block);
            break;
          case Format::kInt4:
            integers<Nibbles, kCount, true>(rows, panel, block);
            break;
          case Format::kFp8:
            floats<kCount>(rows, panel, block);
            break;
        }
      }
    }

    template <class How, size_t kCount>
    using SumsOf = typename How::Sums[kBlocks][kCount][Registers<How::kBytes>::kParts];
    template <class How, size_t kCount>
    using IntsOf =
        typename Registers<How::kBytes>::Ints[kBlocks][kCount][Registers<How::kBytes>::kParts];
    template <class How, size_t kCount>
    using FloatsOf =
        typename Registers<How::kBytes>::Floats[kBlocks][kCount][Registers<How::kBytes>::kParts];

    template <class How, size_t kCount, bool kNibbles>
    void integers(const PackedRows& rows, const std::byte* panel, size_t block) {
      const size_t groups = rows.head->groups(), lines = rows.head->lines();
      const size_t lines_a_group = rows.head->group / (kNibbles ? 8 : 4);
      constexpr size_t kLinesAtOnce = How::kSteps / (kNibbles ? 2 : 1);
      const std::byte* sums_of = panel + groups * kTokens * sizeof(float);
      const std::byte* x = sums_of + groups * kTokens * sizeof(int32_t);
      Lines line(rows, block);
      FloatsOf<How, kCount> totals = {};
      for (size_t g = 0, at = 0; g < groups; ++g) {
        const size_t end = std::min(at + lines_a_group, lines);
        IntsOf<How, kCount> sums;
        const auto* inputs = reinterpret_cast<const int32_t*>(sums_of) + g * kTokens;
        start<How, kCount, kNibbles>(rows, block, g, inputs, sums);
        if constexpr (How::kSteps == PackedHead::kPackedIn) {  // Sums take all: int32 already
          for (; at < end; ++at) add_line<How, kCount, kNibbles>(line, x, sums);
        } else {
          while (at < end) {
            const size_t stop = std::min(end, at + kLinesAtOnce);
            SumsOf<How, kCount> some = {};
            for (; at < stop; ++at) add_line<How, kCount, kNibbles>(line, x, some);
            for_all<How, kCount>([&](size_t b, size_t t, size_t p) __attribute__((always_inline)) {
              sums[b][t][p] += How::widened(some[b][t][p]);
            });
          }
        }
        const auto* x_scales = reinterpret_cast<const float*>(panel) + g * kTokens;
        add_scaled<How, kCount, kNibbles>(rows, block, g, sums, totals,
                                          [&](size_t t) { return x_scales[t]; });
      }
      keep<How, kCount>(totals, block);
    }

    // The next line of each block, four or eight inputs.
    struct Lines {
      Lines(const PackedRows& rows, size_t block) {
        for (size_t b = 0; b < kBlocks; ++b) at[b] = rows.lines[block + b];
      }
      const std::byte* at[kBlocks];
    };

    template <class How, size_t kCount, class Body>
    [[gnu::always_inline]] static void for_all(const Body& body) {
#pragma GCC unroll 2
      for (size_t b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
        for (size_t t = 0; t < kCount; ++t) {
#pragma GCC unroll 4
          for (size_t p = 0; p < Registers<How::kBytes>::kParts; ++p) body(b, t, p);
        }
      }
    }

    // What the zero points take off.
    template <class How, size_t kCount, bool kNibbles>
    static void start(const PackedRows& rows, size_t block, size_t g, const int32_t* inputs,
                      IntsOf<How, kCount>& sums) {
      using R = Registers<How::kBytes>;
      for_all<How, kCount>([&](size_t b, size_t t, size_t p) __attribute__((always_inline)) {
        typename R::Ints zero = typename R::Ints{} + (kNibbles ? 8 : 128);
        if (kNibbles && rows.zeros[block + b] != nullptr) {
          const std::byte* at = rows.zeros[block + b] + g * kLanes + p * R::kRowsOfPart;
          zero = __builtin_convertvector(R::template load<typename R::Bytes>(at), typename R::Ints);
        }
        sums[b][t][p] = -zero * inputs[t];
      });
    }

    // Of each token four inputs more, or eight, whose place is moved on.
    template <class How, size_t kCount, bool kNibbles>
    [[gnu::always_inline]] static void add_line(Lines& line, const std::byte*& x,
                                                SumsOf<How, kCount>& sums) {
      using R = Registers<How::kBytes>;
      typename R::Words w[kBlocks][R::kParts];
#pragma GCC unroll 2
      for (size_t b = 0; b < kBlocks; ++b) {
        kBlocks* kCount == 1 ? __builtin_prefetch(line.at[b] + 2 * kAhead, 0, 2)
                             : __builtin_prefetch(line.at[b] + kAhead);
#pragma GCC unroll 4
        for (size_t p = 0; p < R::kParts; ++p) {
          w[b][p] = R::template load<typename R::Words>(line.at[b] + p * How::kBytes);
        }
        line.at[b] += 64;
      }
      if constexpr (kNibbles) {
        typename R::Words low[kBlocks][R::kParts];
        for_parts<R>([&](size_t b, size_t p) __attribute__((always_inline)) {
          low[b][p] = w[b][p] & 0x0f0f0f0fu;
          w[b][p] = w[b][p] >> 4 & 0x0f0f0f0fu;
        });
        add<How, kCount>(low, x, sums);
      }
      add<How, kCount>(w, x, sums);
    }

    template <class R, class Body>
    [[gnu::always_inline]] static void for_parts(const Body& body) {
#pragma GCC unroll 2
      for (size_t b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 4
        for (size_t p = 0; p < R::kParts; ++p) body(b, p);
      }
    }

    template <class How, size_t kCount>
    [[gnu::always_inline]] static void add(
        const typename Registers<How::kBytes>::Words (&w)[kBlocks][Registers<How::kBytes>::kParts],
        const std::byte*& x, SumsOf<How, kCount>& sums) {
      using R = Registers<How::kBytes>;
      typename How::Split parts[kBlocks][R::kParts];
      for_parts<R>([&](size_t b, size_t p)
                       __attribute__((always_inline)) { parts[b][p] = How::split(w[b][p]); });
#pragma GCC unroll 16
      for (size_t t = 0; t < kCount; ++t) {
        const typename How::Input four = How::input(x + t * How::kStepBytes);
        for_parts<R>([&](size_t b, size_t p) __attribute__((always_inline)) {
          sums[b][t][p] = How::add(sums[b][t][p], parts[b][p], four);
        });
      }
      x += kTokens * How::kStepBytes;
    }

    template <size_t kCount>
    void floats(const PackedRows& rows, const std::byte* panel, size_t block) {
      const size_t groups = rows.head->groups(), lines = rows.head->lines();
      const size_t lines_a_group = rows.head->group / 4;
      Lines line(rows, block);
      FloatsOf<Fp8, kCount> totals = {};
      for (size_t g = 0, at = 0; g < groups; ++g) {
        const size_t end = std::min(at + lines_a_group, lines);
        FloatsOf<Fp8, kCount> sums = {};
        for (; at < end; ++at) add_line<Fp8, kCount, false>(line, panel, sums);
        add_scaled<Fp8, kCount, false>(rows, block, g, sums, totals,
                                       [](size_t) { return Fp8::kScale; });
      }
      keep<Fp8, kCount>(totals, block);
    }

    // A group's sums, each by its row's scale and by `of_token`.
    template <class How, size_t kCount, bool kNibbles, class Sums, class OfToken>
    [[gnu::always_inline]] static void add_scaled(const PackedRows& rows, size_t block, size_t g,
                                                  const Sums& sums, FloatsOf<How, kCount>& totals,
                                                  const OfToken& of_token) {
      using R = Registers<How::kBytes>;
      typename R::Floats scale[kBlocks][R::kParts];
      for_parts<R>([&](size_t b, size_t p) __attribute__((always_inline)) {
        const size_t row = g * kLanes + p * R::kRowsOfPart;
        if constexpr (kNibbles) {
          const auto halves =
              R::template load<typename R::Halves>(rows.scales[block + b] + row * 2);
          scale[b][p] = reinterpret_cast<typename R::Floats>(
              __builtin_convertvector(halves, typename R::Words) << 16);
        } else {
          scale[b][p] = R::template load<typename R::Floats>(rows.scales[block + b] + row * 4);
        }
      });
      for_all<How, kCount>([&](size_t b, size_t t, size_t p) __attribute__((always_inline)) {
        const auto sum = __builtin_convertvector(sums[b][t][p], typename R::Floats);
        totals[b][t][p] += sum * of_token(t) * scale[b][p];
      });
    }

    template <class How, size_t kCount>
    void keep(const FloatsOf<How, kCount>& totals, size_t block) {
      for (size_t b = 0; b < kBlocks; ++b) {
        for (size_t t = 0; t < kCount; ++t) {
          std::memcpy(&sums_[block + b][t], totals[b][t], sizeof(Lanes));
        }
      }
    }

    // Bytes from a line to what is fetched with it: memory answers later than a loop asks. For one
    // token and one block it comes from twice as far into the second cache, which is a quarter
    // faster of bytes on Zen 4, and slower of nibbles for four tokens.
    static constexpr size_t kAhead = 2048;

    Lanes sums_[2][kTokens];
  };

 private:
  bool is_fp8() const { return head_.format == Format::kFp8; }
  size_t steps() const { return steps_of(head_); }
  size_t inputs_at() const { return is_fp8() ? 0 : head_.groups() * kTokens * 8; }

  size_t step_bytes() const {
    if (is_fp8()) return Fp8::kStepBytes;
    return head_.format == Format::kInt4 ? Nibbles::kStepBytes : Bytes::kStepBytes;
  }

  void put_all(const T* row, size_t token, std::byte* panel) const {
    std::byte* at = panel + token * Fp8::kStepBytes;
    for (size_t k = 0; k < steps() * 4; k += 4, at += kTokens * Fp8::kStepBytes) {
      T four[4] = {};
      if (k < head_.in) {
        std::memcpy(four, row + k, std::min<size_t>(4, head_.in - k) * sizeof(T));
      }
      Fp8::put(four, at);
    }
  }

  template <class How>
  void quantise(const T* row, size_t token, std::byte* panel) const {
    std::byte* at = panel + inputs_at() + token * How::kStepBytes;
    const auto put_four = [&](size_t, size_t, const int8_t* four) {
      How::put(four, at);
      at += kTokens * How::kStepBytes;
    };
    quantise_row(head_, row, put_four, [&](size_t group, float scale, int32_t sum) {
      const size_t of_group = (group * kTokens + token) * sizeof(float);
      std::memcpy(panel + of_group, &scale, sizeof scale);
      std::memcpy(panel + head_.groups() * kTokens * sizeof(float) + of_group, &sum, sizeof sum);
    });
  }

  const Weight& weight_;
  const PackedHead& head_;
};

// ---- what needs no particular instruction ----

// Bytes, or nibbles, by products of pairs of 16 bits: `Pairs::add(sums, a, b)` adds both products
// of each lane, exactly.
template <class Pairs>
struct PairBytes {
  static constexpr size_t kBytes = Pairs::kBytes, kStepBytes = 8;
  static constexpr size_t kSteps = PackedHead::kPackedIn;
  using Words = typename Registers<kBytes>::Words;
  using Sums = typename Registers<kBytes>::Ints;
  struct Split {
    Words even, odd;
  };
  using Input = Split;

  static void put(const int8_t* q, std::byte* at) {
    const int16_t wide[4] = {q[0], q[2], q[1], q[3]};
    std::memcpy(at, wide, sizeof wide);
  }

  [[gnu::always_inline]] static Split split(Words line) {
    typedef uint16_t Pair __attribute__((vector_size(kBytes)));
    const auto odd = reinterpret_cast<Words>(reinterpret_cast<Pair>(line) >> 8);
    return {line & 0x00ff00ffu, odd};
  }

  [[gnu::always_inline]] static Input input(const std::byte* at) {
    uint32_t first, second;  // apart: each is broadcast from memory
    std::memcpy(&first, at, sizeof first);
    std::memcpy(&second, at + sizeof first, sizeof second);
    return {Words{} + first, Words{} + second};
  }

  [[gnu::always_inline]] static Sums add(Sums sums, const Split& w, const Input& x) {
    return Pairs::add(Pairs::add(sums, w.even, x.even), w.odd, x.odd);
  }

  [[gnu::always_inline]] static Sums widened(Sums sums) { return sums; }
};

struct PlainPairs {
  static constexpr size_t kBytes = 16;
  using Words = Registers<kBytes>::Words;
  using Ints = Registers<kBytes>::Ints;

  static Ints add(Ints sums, Words a, Words b) {
    const auto x = reinterpret_cast<Ints>(a), y = reinterpret_cast<Ints>(b);
    return sums + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
  }
};

// fp8 in float32, one product after the other. The bits of a code, where float32 has its own, are
// 2^-120 of its value: inputs are made larger, so that no product is too small, and their sums are
// set right.
template <size_t kRegister>
struct WideFp8 {
  static constexpr size_t kBytes = kRegister, kStepBytes = 16;
  static constexpr float kScale = 0x1p60f;
  using Words = typename Registers<kBytes>::Words;
  using Ints = typename Registers<kBytes>::Ints;
  using Sums = typename Registers<kBytes>::Floats;
  struct Split {
    Sums values[4];
  };
  struct Input {
    float values[4];
  };

  template <class T>
  static void put(const T* x, std::byte* at) {
    for (size_t i = 0; i < 4; ++i) {
      const float larger = to_float(x[i]) * 0x1p60f;
      std::memcpy(at + i * sizeof larger, &larger, sizeof larger);
    }
  }

  [[gnu::always_inline]] static Split split(Words codes) {
    return {{value(codes << 24), value(codes << 16), value(codes << 8), value(codes)}};
  }

  [[gnu::always_inline]] static Input input(const std::byte* at) {
    Input four;
    std::memcpy(&four, at, sizeof four);
    return four;
  }

  [[gnu::always_inline]] static Sums add(Sums sums, const Split& w, const Input& x) {
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) sums += w.values[i] * x.values[i];
    return sums;
  }

 private:
  // Of the upper byte: sign, four bits of exponent, three of mantissa.
  [[gnu::always_inline]] static Sums value(Words codes) {
    const auto moved = reinterpret_cast<Words>(reinterpret_cast<Ints>(codes) >> 4);
    return reinterpret_cast<Sums>(moved & 0x87f00000u);
  }
};

// The kernels of quantised weights for both types of x and y.
template <class Bytes, class Nibbles, class Fp8OfFloats, class Fp8OfHalves, size_t kTokens,
          size_t kBlocks>
struct PackedKernels {
  using Floats = PackedProduct<float, Bytes, Nibbles, Fp8OfFloats, kTokens, kBlocks>;
  using Halves = PackedProduct<uint16_t, Bytes, Nibbles, Fp8OfHalves, kTokens, kBlocks>;

  static void linear(const Linear& call, Workspace& workspace) {
    call.type == Type::kFloat32 ? experts::linear<Floats>(call, workspace)
                                : experts::linear<Halves>(call, workspace);
  }

  static void ffn(const Ffn& call, Workspace& workspace) {
    call.type == Type::kFloat32 ? experts::ffn<Floats>(call, workspace)
                                : experts::ffn<Halves>(call, workspace);
  }
};

}  // namespace
}  // namespace kvc2::experts
