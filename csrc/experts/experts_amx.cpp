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

  class Multiplier {
   public:
    template <class Epilogue>
    void run(const WeightRows<uint16_t>& rows, const Panels& panels, const Epilogue& epilogue) {
      const size_t in = rows.in;
      // A missing second run is computed as the first again, and dropped by the caller.
      const uint16_t* second = rows.second_count > 0 ? rows.second : rows.first;
      const size_t count = divided_up(panels.tokens, kTokens);
      const bool fetch = count <= 2;  // then it is the weights that we wait for
      size_t p = 0;
      for (; p + 2 <= count; p += 2) {
        multiply_two(rows.first, second, in, panels.at(p), panels.at(p + 1), fetch);
        for (auto& tile : sums_) transpose(tile);
        epilogue(p, sums_[0], sums_[1]);
        epilogue(p + 1, sums_[2], sums_[3]);
      }
      if (p < count) {
        multiply_one(rows.first, second, in, panels.at(p), fetch);
        for (size_t i = 0; i < 2; ++i) transpose(sums_[i]);
        epilogue(p, sums_[0], sums_[1]);
      }
    }

   private:
    // The same lines of the next sixteen rows: one call's rows are too few for the prefetcher.
    static void prefetch(const uint16_t* w, size_t in) {
      for (size_t row = kLanes; row < 2 * kLanes; ++row) {
        _mm_prefetch(reinterpret_cast<const char*>(w + row * in), _MM_HINT_T0);
      }
    }

    void multiply_two(const uint16_t* first, const uint16_t* second, size_t in,
                      const std::byte* left, const std::byte* right, bool fetch) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (size_t k = 0; k < in; k += kTilePairs * 2) {
        if (fetch) prefetch(first + k, in), prefetch(second + k, in);
        _tile_loadd(4, first + k, in * sizeof(uint16_t));
        _tile_loadd(6, left + k / 2 * kTileRowBytes, kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, second + k, in * sizeof(uint16_t));
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, right + k / 2 * kTileRowBytes, kTileRowBytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums_[0], kTileRowBytes);
      _tile_stored(1, sums_[1], kTileRowBytes);
      _tile_stored(2, sums_[2], kTileRowBytes);
      _tile_stored(3, sums_[3], kTileRowBytes);
    }

    void multiply_one(const uint16_t* first, const uint16_t* second, size_t in,
                      const std::byte* panel, bool fetch) {
      _tile_zero(0);
      _tile_zero(1);
      for (size_t k = 0; k < in; k += kTilePairs * 2) {
        if (fetch) prefetch(first + k, in), prefetch(second + k, in);
        _tile_loadd(4, first + k, in * sizeof(uint16_t));
        _tile_loadd(5, second + k, in * sizeof(uint16_t));
        _tile_loadd(6, panel + k / 2 * kTileRowBytes, kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
      }
      _tile_stored(0, sums_[0], kTileRowBytes);
      _tile_stored(1, sums_[1], kTileRowBytes);
    }

    Tiles tiles_;
    Lanes sums_[4][kLanes];  // a lane is a token, and after `transpose` a weight row
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
