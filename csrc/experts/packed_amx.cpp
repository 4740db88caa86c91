// Quantised weights in AMX tiles: sixteen tokens with sixteen rows at a time. A line of a record is
// a row of a tile as it is stored: four bytes of each of sixteen rows. fp8 becomes pairs of
// bfloat16 first, and nibbles become bytes.
//
// Sums of integers are exact, so few tokens, which wait for memory, are left to vpdpbusd, and have
// the same bits. Tiles of bfloat16 have an order of their own: fp8 goes through them always.
#include <immintrin.h>

#include <type_traits>

#include "base/tiles.h"
#include "experts/fp8_pairs.h"
#include "experts/vnni.h"

namespace kvc2::experts {
namespace {

constexpr size_t kTileBytes = 16 * kTileRowBytes;
constexpr size_t kTilesOfGroup = 16;  // at most, of what isn't multiplied as it is stored

// The two bytes of the bfloat16 that each magnitude of e4m3fn is.
struct Fp8Bytes {
  constexpr Fp8Bytes() {
    for (unsigned code = 0; code < 128; ++code) {
      unsigned exponent = code >> 3, mantissa = code & 7, bits = 0;
      if (exponent > 0) {
        bits = (exponent + 120) << 7 | mantissa << 4;
      } else if (mantissa > 0) {  // mantissa * 2^-9
        exponent = 121;
        while (mantissa < 8) mantissa <<= 1, --exponent;
        bits = exponent << 7 | (mantissa & 7) << 4;
      }
      low[code] = static_cast<uint8_t>(bits), high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
  alignas(64) uint8_t low[128] = {};
  alignas(64) uint8_t high[128] = {};
};
constexpr Fp8Bytes kFp8;

// How a record's groups are divided into tiles: of 64 integers, or of 32 values of fp8.
struct Division {
  explicit Division(const PackedHead& head)
      : floats(head.format == Format::kFp8),
        groups(head.groups()),
        steps(steps_of(head)),
        steps_a_group(head.group / 4),
        steps_a_tile(floats ? 8 : 16),
        tiles_a_group(divided_up(std::min(steps_a_group, steps), steps_a_tile)) {}

  size_t steps_of_group(size_t g) const {
    return std::min(steps_a_group, steps - g * steps_a_group);
  }

  bool floats;
  size_t groups;
  size_t steps, steps_a_group, steps_a_tile;  // fours of inputs
  size_t tiles_a_group;
};

template <class T>
class PackedTiles {
 public:
  using Element = T;
  static constexpr size_t kTokens = kLanes;

  PackedTiles(const Weight& weight, size_t) : weight_(weight), division_(*weight.head) {}

  // Of integers [groups][tokens] scales, and sums of the group's integers; then, of all, the
  // inputs, [groups][tiles][tokens][64].
  size_t panel_bytes() const {
    return inputs_at(division_) + division_.groups * division_.tiles_a_group * kTileBytes;
  }

  void pack(const T* const (&rows)[kTokens], std::byte* panel) const {
    std::byte* tiles = panel + inputs_at(division_);
    if (division_.steps_of_group(0) % division_.steps_a_tile != 0 ||
        division_.steps % division_.steps_a_tile != 0) {
      std::memset(tiles, 0, panel_bytes() - inputs_at(division_));  // what no input fills
    }
    for (size_t t = 0; t < kTokens; ++t) {
      if (rows[t] == nullptr) continue;  // nobody's: its sums are dropped
      if constexpr (std::is_same_v<T, uint16_t>) {
        if (division_.floats) {
          put_floats(rows[t], t, tiles);
          continue;
        }
      }
      quantise(rows[t], t, panel, tiles);
    }
  }

  PackedRows rows(const Pick& pick) const { return packed_rows(weight_, pick); }

  class Multiplier {
   public:
    template <class Epilogue>
    void run(const PackedRows& rows, const Panels& panels, const Epilogue& epilogue) {
      const size_t count = divided_up(panels.tokens, kTokens);
      const Division division(*rows.head);
      for (size_t from = 0; from < count; from += kPanels) {
        const size_t now = std::min(kPanels, count - from);
        for (size_t i = 0; i < now; ++i) std::memset(&totals_[i], 0, sizeof totals_[i]);
        Group next = load(rows, division, 0);
        for (size_t g = 0; g < division.groups; ++g) {
          const Group group = next;  // unpacked a group ago: what a tile loads is in memory then
          if (g + 1 < division.groups) next = load(rows, division, g + 1);
          size_t i = 0;
          for (; i + 2 <= now; i += 2) {
            multiply<2>(rows, division, group, g, panels, from + i, &totals_[i]);
          }
          if (i < now) multiply<1>(rows, division, group, g, panels, from + i, &totals_[i]);
        }
        for (size_t i = 0; i < now; ++i) {
          epilogue(from + i, totals_[i].rows[0], totals_[i].rows[1]);
        }
      }
    }

   private:
    static constexpr size_t kPanels = 16;  // that share a group's tiles: their sums fill a cache

    struct Totals {
      Lanes rows[2][kTokens];
    };

    // A group's tiles of two blocks of rows: `whole` of them one behind the other, then perhaps one
    // that is filled up.
    struct Group {
      const std::byte* data[2];
      size_t tiles, whole;
      const std::byte* last[2];
      const std::byte* at(size_t block, size_t i) const {
        return i < whole ? data[block] + i * kTileBytes : last[block];
      }
    };

    Group load(const PackedRows& rows, const Division& division, size_t g) {
      const size_t steps = division.steps_of_group(g);
      Group group{{}, divided_up(steps, division.steps_a_tile), 0, {}};
      group.whole = rows.head->format == Format::kInt8 ? steps / 16 : group.tiles;
      const size_t lines_a_group = rows.head->group / rows.head->values_a_line();
      auto& unpacked = unpacked_[g % 2];
      for (size_t b = 0; b < 2; ++b) {
        const std::byte* lines = rows.lines[b] + g * lines_a_group * 64;
        switch (rows.head->format) {
          case Format::kInt8:
            group.data[b] = lines, group.last[b] = unpacked[b];
            std::memcpy(unpacked[b], lines + group.whole * kTileBytes, steps % 16 * 64);
            break;
          case Format::kInt4:
            group.data[b] = unpacked[b];
            unpack_nibbles(lines, steps / 2, unpacked[b]);
            break;
          case Format::kFp8:
            group.data[b] = unpacked[b];
            unpack_floats(lines, steps, unpacked[b]);
            std::memset(unpacked[b] + steps * 128, 0, group.tiles * kTileBytes - steps * 128);
        }
      }
      return group;
    }

    static void unpack_nibbles(const std::byte* lines, size_t count, std::byte* bytes) {
      for (size_t i = 0; i < count; ++i, lines += 64, bytes += 128) {
        __builtin_prefetch(lines + kAhead);
        const __m512i line = _mm512_loadu_si512(lines), low = _mm512_set1_epi8(0x0f);
        _mm512_store_si512(bytes, _mm512_and_si512(line, low));
        _mm512_store_si512(bytes + 64, _mm512_and_si512(_mm512_srli_epi32(line, 4), low));
      }
    }

    // As Bf16Fp8::split, by tables of the bytes of all magnitudes.
    static void unpack_floats(const std::byte* lines, size_t count, std::byte* pairs) {
      const __m512i low_0 = _mm512_load_si512(kFp8.low), low_1 = _mm512_load_si512(kFp8.low + 64);
      const __m512i high_0 = _mm512_load_si512(kFp8.high);
      const __m512i high_1 = _mm512_load_si512(kFp8.high + 64);
      const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
      const __m512i upper = _mm512_set1_epi16(static_cast<short>(0xff00));
      for (size_t i = 0; i < count; ++i, lines += 64, pairs += 128) {
        __builtin_prefetch(lines + kAhead);
        const __m512i codes = _mm512_loadu_si512(lines);
        const __m512i low = _mm512_permutex2var_epi8(low_0, codes, low_1);
        const __m512i magnitude = _mm512_permutex2var_epi8(high_0, codes, high_1);
        // magnitude | codes & sign; then upper ? one : the other
        const __m512i high = _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xf8);
        const __m512i even =
            _mm512_ternarylogic_epi32(upper, _mm512_slli_epi16(high, 8), low, 0xca);
        const __m512i odd = _mm512_ternarylogic_epi32(upper, high, _mm512_srli_epi16(low, 8), 0xca);
        _mm512_store_si512(pairs, even);
        _mm512_store_si512(pairs + 64, odd);
      }
    }

    // Sums of one group, of one or two panels.
    template <size_t kNow>
    void multiply(const PackedRows& rows, const Division& division, const Group& group, size_t g,
                  const Panels& panels, size_t panel, Totals* totals) {
      const std::byte* inputs[kNow];
      for (size_t i = 0; i < kNow; ++i) {
        inputs[i] =
            panels.at(panel + i) + inputs_at(division) + g * division.tiles_a_group * kTileBytes;
      }
      tiles_read_memory();
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (division.floats) {
        multiply_floats<kNow>(group, inputs);
      } else {
        multiply_integers<kNow>(group, inputs);
      }
      _tile_stored(0, sums_[0][0], kTileRowBytes);
      _tile_stored(1, sums_[0][1], kTileRowBytes);
      if constexpr (kNow == 2) {
        _tile_stored(2, sums_[1][0], kTileRowBytes);
        _tile_stored(3, sums_[1][1], kTileRowBytes);
      }
      for (size_t b = 0; b < 2; ++b) {
        const Lanes scale = scales(rows, b, g);
        for (size_t i = 0; i < kNow; ++i) {
          const size_t tokens = std::min(kTokens, panels.tokens - (panel + i) * kTokens);
          division.floats ? add_floats(sums_[i][b], tokens, scale, totals[i].rows[b])
                          : add_integers(rows, b, g, division, panels.at(panel + i), sums_[i][b],
                                         tokens, scale, totals[i].rows[b]);
        }
      }
    }

    template <size_t kNow>
    static void multiply_integers(const Group& group, const std::byte* const (&inputs)[kNow]) {
      for (size_t i = 0; i < group.tiles; ++i) {
        const std::byte *first = group.at(0, i), *second = group.at(1, i);
        fetch(first), fetch(second);
        _tile_loadd(4, inputs[0] + i * kTileBytes, kTileRowBytes);
        _tile_loadd(6, first, kTileRowBytes);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, second, kTileRowBytes);
        _tile_dpbsud(1, 4, 7);
        if constexpr (kNow == 2) {
          _tile_loadd(5, inputs[1] + i * kTileBytes, kTileRowBytes);
          _tile_dpbsud(2, 5, 6);
          _tile_dpbsud(3, 5, 7);
        }
      }
    }

    template <size_t kNow>
    static void multiply_floats(const Group& group, const std::byte* const (&inputs)[kNow]) {
      for (size_t i = 0; i < group.tiles; ++i) {
        _tile_loadd(4, inputs[0] + i * kTileBytes, kTileRowBytes);
        _tile_loadd(6, group.at(0, i), kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, group.at(1, i), kTileRowBytes);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kNow == 2) {
          _tile_loadd(5, inputs[1] + i * kTileBytes, kTileRowBytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }

    static void fetch(const std::byte* tile) {
      for (size_t row = 0; row < 16; ++row) __builtin_prefetch(tile + kAhead + row * 64);
    }

    static Lanes scales(const PackedRows& rows, size_t b, size_t g) {
      if (rows.head->format != Format::kInt4) return kvc2::load(rows.scales[b] + g * 64);
      HalfLanes halves;
      std::memcpy(&halves, rows.scales[b] + g * 32, sizeof halves);
      return widen(halves);
    }

    static void add_floats(const Lanes (&sums)[kTokens], size_t tokens, Lanes scale,
                           Lanes (&totals)[kTokens]) {
      for (size_t t = 0; t < tokens; ++t) totals[t] += sums[t] * scale;
    }

    // As packed_product.h adds them.
    static void add_integers(const PackedRows& rows, size_t b, size_t g, const Division& division,
                             const std::byte* panel, const Lanes (&sums)[kTokens], size_t tokens,
                             Lanes scale, Lanes (&totals)[kTokens]) {
      IntLanes zero = IntLanes{} + (rows.head->format == Format::kInt4 ? 8 : 128);
      if (rows.zeros[b] != nullptr) {
        uint8_t __attribute__((vector_size(16))) bytes;
        std::memcpy(&bytes, rows.zeros[b] + g * kLanes, sizeof bytes);
        zero = __builtin_convertvector(bytes, IntLanes);
      }
      const auto* of_tokens = reinterpret_cast<const float*>(panel) + g * kTokens;
      const auto* inputs =
          reinterpret_cast<const int32_t*>(panel) + (division.groups + g) * kTokens;
      for (size_t t = 0; t < tokens; ++t) {
        const IntLanes all = reinterpret_cast<IntLanes>(sums[t]) - zero * inputs[t];
        totals[t] += __builtin_convertvector(all, Lanes) * of_tokens[t] * scale;
      }
    }

    static constexpr size_t kAhead = 4096;  // bytes, as packed_product.h fetches one token's

    Tiles tiles_;
    alignas(64) std::byte unpacked_[2][2][kTilesOfGroup * kTileBytes];  // groups by turns, blocks
    Lanes sums_[2][2][kTokens];  // panels, blocks; of integers their bits
    Totals totals_[kPanels];
  };

 private:
  static size_t inputs_at(const Division& division) {
    return division.floats ? 0 : division.groups * kTokens * 8;
  }

  void quantise(const T* row, size_t token, std::byte* panel, std::byte* tiles) const {
    const auto put_four = [&](size_t group, size_t step, const int8_t* four) {
      const size_t tile = group * division_.tiles_a_group + step / 16;
      std::memcpy(tiles + tile * kTileBytes + token * 64 + step % 16 * 4, four, 4);
    };
    quantise_row(*weight_.head, row, put_four, [&](size_t group, float scale, int32_t sum) {
      const size_t at = group * kTokens + token;
      std::memcpy(panel + at * 4, &scale, sizeof scale);
      std::memcpy(panel + (division_.groups * kTokens + at) * 4, &sum, sizeof sum);
    });
  }

  void put_floats(const uint16_t* row, size_t token, std::byte* tiles) const {
    const size_t in = weight_.head->in;
    for (size_t step = 0; step < division_.steps; ++step) {
      const size_t group = step / division_.steps_a_group, of_it = step % division_.steps_a_group;
      const size_t tile = group * division_.tiles_a_group + of_it / 8;
      uint16_t four[4] = {};
      std::memcpy(four, row + step * 4, std::min<size_t>(4, in - step * 4) * sizeof(uint16_t));
      Bf16Fp8::put(four, tiles + tile * kTileBytes + token * 64 + of_it % 8 * 8);
    }
  }

  const Weight& weight_;
  const Division division_;
};

bool in_tiles(const PackedHead& head, Type type) {
  if (head.format == Format::kInt8) return head.group % 64 == 0 || head.groups() == 1;
  if (head.format == Format::kFp8 && type == Type::kFloat32) return false;
  // Of shorter groups a tile would be half empty.
  const Division division(head);
  return division.tiles_a_group <= kTilesOfGroup &&
         (division.floats || division.steps_a_group % 16 == 0);
}

// With so many tokens a weight, tiles are faster than vpdpbusd.
constexpr size_t kFew = 8;

template <template <class> class Run, class Call>
void by_type(const Call& call, Workspace& workspace) {
  call.type == Type::kFloat32 ? Run<PackedTiles<float>>(call, workspace).run()
                              : Run<PackedTiles<uint16_t>>(call, workspace).run();
}

void amx_linear(const Linear& call, Workspace& workspace) {
  const bool always = call.w.head->format == Format::kFp8;
  if (!in_tiles(*call.w.head, call.type) || (!always && call.tokens < kFew)) {
    return kAvx512Bf16Packed.linear(call, workspace);
  }
  by_type<LinearRun>(call, workspace);
}

void amx_ffn(const Ffn& call, Workspace& workspace) {
  const auto* up = call.gate_up.head;
  const auto* down = call.down.head;
  if (up == nullptr || down == nullptr) return kAvx512Bf16Packed.ffn(call, workspace);
  const bool always = up->format == Format::kFp8 || down->format == Format::kFp8;
  const bool few = call.tokens * call.chosen < kFew * call.experts;
  if (!in_tiles(*up, call.type) || !in_tiles(*down, call.type) || (few && !always)) {
    return kAvx512Bf16Packed.ffn(call, workspace);
  }
  by_type<FfnRun>(call, workspace);
}

}  // namespace

const Kernels kAmxPacked = {amx_linear, amx_ffn};

}  // namespace kvc2::experts
