// bfloat16 in AMX tiles. Keys are the left operand of the scores as they lie in a page; values are
// transposed once per block, for all tiles of the piece; weights are rounded to bfloat16.
#include <immintrin.h>

#include "attention/flash.h"
#include "base/tiles.h"

namespace kvc2::attention {
namespace {

struct TilesMath {
  using Element = uint16_t;

  // A panel is [dim / 2][16] pairs: a tile row is one pair of dimensions of sixteen queries.
  static size_t panel_bytes(size_t dim) { return dim / 2 * kTileRowBytes; }

  static void pack(const uint16_t* const (&rows)[kLanes], size_t dim, std::byte* panel) {
    pack_pairs(rows, dim, panel);
  }

  class Block {
   public:
    explicit Block(size_t dim) : dim_(dim), keys_(kBlock * dim / kLanes), values_(keys_.size()) {}

    void load(const uint16_t* const* keys, const uint16_t* const* values, size_t count) {
      count_ = (count + kPairs - 1) / kPairs * kPairs;
      auto* rows = reinterpret_cast<std::byte*>(keys_.data());
      for (size_t j = 0; j < count_; ++j) {
        const size_t bytes = dim_ * sizeof(uint16_t);
        j < count ? std::memcpy(rows + j * bytes, keys[j], bytes)
                  : std::memset(rows + j * bytes, 0, bytes);
      }
      for (size_t j = 0; j < count_; j += kPairs) {
        for (size_t d = 0; d < dim_; d += kLanes) transpose_values(values, count, j, d);
      }
    }

    void score(const std::byte* panel, Lanes* scores) const {
      const auto* keys = reinterpret_cast<const std::byte*>(keys_.data());
      const size_t row = dim_ * sizeof(uint16_t);
      for (size_t j = 0; j < count_; j += 2 * kLanes) {
        _tile_zero(0);
        _tile_zero(1);
        for (size_t step = 0; step < row; step += kTileRowBytes) {
          _tile_loadd(6, panel + step * kLanes, kTileRowBytes);
          _tile_loadd(4, keys + j * row + step, row);
          _tile_loadd(5, keys + (j + kLanes) * row + step, row);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, scores + j, kTileRowBytes);
        _tile_stored(1, scores + j + kLanes, kTileRowBytes);
      }
    }

    void mix(const Lanes* weights, Lanes* sums) const {
      Lanes pairs[kBlock / 2];
      for (size_t j = 0; j < count_; j += 2) {
        const WordLanes pair = (round_to_bf16(weights[j]) >> 16) | round_to_bf16(weights[j + 1]);
        pairs[j / 2] = reinterpret_cast<Lanes>(pair);
      }
      const auto* values = reinterpret_cast<const std::byte*>(values_.data());
      constexpr size_t kRow = kBlock * sizeof(uint16_t);
      for (size_t d = 0; d < dim_; d += 2 * kLanes) {
        _tile_loadd(0, sums + d, kTileRowBytes);
        _tile_loadd(1, sums + d + kLanes, kTileRowBytes);
        for (size_t j = 0; j < count_; j += kPairs) {
          _tile_loadd(6, pairs + j / 2, kTileRowBytes);
          _tile_loadd(4, values + d * kRow + j * sizeof(uint16_t), kRow);
          _tile_loadd(5, values + (d + kLanes) * kRow + j * sizeof(uint16_t), kRow);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, sums + d, kTileRowBytes);
        _tile_stored(1, sums + d + kLanes, kTileRowBytes);
      }
    }

   private:
    static constexpr size_t kPairs = 2 * kTilePairs;  // keys in one tile of weights

    // values_[d .. d + 16][j .. j + 32] from thirty-two rows: pairs of keys, then pairs transposed.
    void transpose_values(const uint16_t* const* values, size_t count, size_t j, size_t d) {
      Lanes words[kLanes];
      for (size_t i = 0; i < kLanes; ++i) {
        const size_t at = j + 2 * i;
        const Lanes even = at < count ? load_as_floats(values[at] + d) : Lanes{};
        const Lanes odd = at + 1 < count ? load_as_floats(values[at + 1] + d) : Lanes{};
        const WordLanes low = reinterpret_cast<WordLanes>(even) >> 16;
        words[i] = reinterpret_cast<Lanes>(low | reinterpret_cast<WordLanes>(odd));
      }
      transpose(words);
      auto* to = reinterpret_cast<std::byte*>(values_.data()) + j * sizeof(uint16_t);
      for (size_t i = 0; i < kLanes; ++i) {
        store(to + (d + i) * kBlock * sizeof(uint16_t), words[i]);
      }
    }

    Tiles tiles_;
    const size_t dim_;
    std::vector<Lanes> keys_;    // bfloat16 [kBlock][dim]
    std::vector<Lanes> values_;  // bfloat16 [dim][kBlock]
    size_t count_ = 0;
  };
};

void amx_attend(const Attend& call, Workspace& workspace) {
  const bool fits = call.type == Type::kBfloat16 && call.shape.head_dim % 32 == 0;
  fits ? attend<TilesMath>(call, workspace) : kAvx512Kernels.attend(call, workspace);
}

}  // namespace

const Kernels kAmxKernels = {amx_attend};

}  // namespace kvc2::attention
