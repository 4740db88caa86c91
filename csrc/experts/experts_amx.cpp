// bfloat16 products in AMX tiles. With tokens as columns a weight's stored rows are the left
// operand as they are, so nothing is repacked, and one token costs what its weights' bytes cost.
#include <immintrin.h>

#include "base/tiles.h"
#include "experts/grouped.h"

namespace kvc2::experts {
namespace {

class TilesProduct {
 public:
  using Element = uint16_t;
  static constexpr size_t kTokens = kLanes;

  TilesProduct(const Weight& weight, size_t in) : weight_(weight), in_(in) {}

  // A panel is [in / 2][16] pairs: the pair (x[2k], x[2k + 1]) of sixteen tokens is a tile row.
  size_t panel_bytes() const { return in_ / 2 * kTileRowBytes; }

  void pack(const uint16_t* const (&rows)[kLanes], std::byte* panel) const {
    pack_pairs(rows, in_, panel);
  }

  WeightRows<uint16_t> rows(const Pick& pick) const { return {weight_, pick}; }

  // Two panels share each tile of weights that is loaded.
  class Multiplier {
   public:
    template <class Epilogue>
    void run(const WeightRows<uint16_t>& rows, const Panels& panels, const Epilogue& epilogue) {
      // A missing second run is computed as the first again, and dropped by the caller.
      const uint16_t* second = rows.second_count > 0 ? rows.second : rows.first;
      const uint16_t* const runs[2] = {rows.first, second};
      tiles_read_memory();
      const size_t count = divided_up(panels.tokens, kTokens);
      for (size_t p = 0; p < count; p += 2) {
        if (p + 1 == count) {
          p == 0 ? multiply<1, true>(runs, rows.in, panels, p)
                 : multiply<1, false>(runs, rows.in, panels, p);
          finish(p, sums_[0], epilogue);
        } else {
          p == 0 ? multiply<2, true>(runs, rows.in, panels, p)
                 : multiply<2, false>(runs, rows.in, panels, p);
          finish(p, sums_[0], epilogue);
          finish(p + 1, sums_[1], epilogue);
        }
      }
    }

   private:
    // A lane is a token, and after `transpose` a weight row.
    using Sums = Lanes[2][kLanes];  // of a panel and both runs

    // While a tile is loaded, as many lines are fetched of the rows that come next, one line after
    // the other: this is how memory is fastest. Later panels find all in the second cache.
    static void fetch(const uint16_t* rows, size_t in, size_t k) {
      const auto* next = reinterpret_cast<const char*>(rows + kLanes * (in + k));
      for (size_t line = 0; line < kLanes; ++line) __builtin_prefetch(next + line * 64, 0, 2);
    }

    template <size_t kNow, bool kFetch>
    void multiply(const uint16_t* const (&runs)[2], size_t in, const Panels& panels, size_t panel) {
      const std::byte* left = panels.at(panel);
      const std::byte* right = panels.at(panel + kNow - 1);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (size_t k = 0; k < in; k += kTilePairs * 2) {
        if (kFetch) fetch(runs[0], in, k), fetch(runs[1], in, k);
        _tile_loadd(4, runs[0] + k, in * sizeof(uint16_t));
        _tile_loadd(6, left + k / 2 * kTileRowBytes, kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, runs[1] + k, in * sizeof(uint16_t));
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (kNow == 2) {
          _tile_loadd(7, right + k / 2 * kTileRowBytes, kTileRowBytes);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, sums_[0][0], kTileRowBytes);
      _tile_stored(1, sums_[0][1], kTileRowBytes);
      if constexpr (kNow == 2) {
        _tile_stored(2, sums_[1][0], kTileRowBytes);
        _tile_stored(3, sums_[1][1], kTileRowBytes);
      }
    }

    template <class Epilogue>
    static void finish(size_t panel, Sums& sums, const Epilogue& epilogue) {
      transpose(sums[0]);
      transpose(sums[1]);
      epilogue(panel, sums[0], sums[1]);
    }

    Tiles tiles_;
    Sums sums_[2];
  };

 private:
  const Weight& weight_;
  const size_t in_;
};

void amx_linear(const Linear& call, Workspace& workspace) {
  const bool fits = call.type == Type::kBfloat16 && call.in % 32 == 0 && call.out % 16 == 0;
  fits ? linear<TilesProduct>(call, workspace) : kAvx512Bf16Kernels.linear(call, workspace);
}

void amx_ffn(const Ffn& call, Workspace& workspace) {
  const bool fits = call.type == Type::kBfloat16 && call.hidden % 32 == 0 && call.size % 32 == 0;
  fits ? ffn<TilesProduct>(call, workspace) : kAvx512Bf16Kernels.ffn(call, workspace);
}

}  // namespace

const Kernels kAmxKernels = {amx_linear, amx_ffn};

}  // namespace kvc2::experts
