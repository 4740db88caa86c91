// bfloat16 in AMX tiles: sixteen rows with sixteen keys, or with sixteen elements of values, at a
// time, the words as flash.h lays them. The weights are rounded to bfloat16.
#include <immintrin.h>

#include "attention/pairs.h"
#include "base/tiles.h"

namespace kvc2::attention {
namespace {

constexpr size_t kWordBytes = 4;

struct TilesMath : Pairs {
  // Rows beyond call.rows, up to a multiple of sixteen, are computed of whatever is there.
  static void score(const Score<uint16_t>& call) {
    const Tiles tiles;
    for (size_t row = 0; row < call.rows; row += kLanes) {
      for (size_t vector = 0; vector < call.vectors; vector += 2) {  // there are four
        const float* keys = call.keys + vector * call.steps * kLanes;
        _tile_zero(0);
        _tile_zero(1);
        for (size_t step = 0; step < call.steps; step += kTilePairs) {
          _tile_loadd(6, call.queries + row * call.steps + step, call.steps * kWordBytes);
          _tile_loadd(4, keys + step * kLanes, kTileRowBytes);
          _tile_loadd(5, keys + (call.steps + step) * kLanes, kTileRowBytes);
          _tile_dpbf16ps(0, 6, 4);
          _tile_dpbf16ps(1, 6, 5);
        }
        float* to = call.scores + row * kPiece + vector * kLanes;
        _tile_stored(0, to, kPiece * kWordBytes);
        _tile_stored(1, to + kLanes, kPiece * kWordBytes);
      }
    }
  }

  static void mix(const Mix<uint16_t>& call) {
    auto* pairs = static_cast<float*>(call.scratch);  // [kBlock / 2][width]
    for (size_t j = 0; j < kBlock; j += kPack) {
      for (size_t at = 0; at < call.width; at += kWidth) {
        Lanes value[2];
        some(call.values + j, at, call.size - at, value);
        store(pairs + j / kPack * call.width + at, value[0]);
        store(pairs + j / kPack * call.width + at + kLanes, value[1]);
      }
    }
    const Tiles tiles;
    for (size_t row = 0; row < call.rows; row += kLanes) {
      for (size_t at = 0; at < call.width; at += kLanes) {
        float* sums = call.sums + row * call.width + at;
        _tile_loadd(0, sums, call.width * kWordBytes);
        for (size_t step = 0; step < kBlock / kPack; step += kTilePairs) {
          _tile_loadd(6, call.weights + row * kPiece + step, kPiece * kWordBytes);
          _tile_loadd(4, pairs + step * call.width + at, call.width * kWordBytes);
          _tile_dpbf16ps(0, 6, 4);
        }
        _tile_stored(0, sums, call.width * kWordBytes);
      }
    }
  }
};

void amx_attend(const Attend& call, Workspace& workspace) {
  call.type == Type::kBfloat16 ? attend<TilesMath>(call, workspace)
                               : kAvx512Kernels.attend(call, workspace);
}

}  // namespace

const Kernels kAmxKernels = {amx_attend};

}  // namespace kvc2::attention
