// bfloat16 in AMX tiles. Sixteen keys are the left operand as they are stored, and sixteen queries
// the right one, turned once: so few rows cost little. The scores are turned back. Of values the
// even elements of 32 come first, then the odd ones: pairs of two keys are made by shifts then. The
// weights are rounded to bfloat16.
#include <immintrin.h>

#include "attention/pairs.h"
#include "base/tiles.h"

namespace kvc2::attention {
namespace {

constexpr size_t kWordBytes = 4;

struct TilesMath : Pairs {
  using Held = Tiles;

  static void turn(const uint16_t* const* keys, size_t at, size_t count, float* to) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) store(to + i * kLanes, words(keys[i] + at, count));
  }

  // In their place, sixteen rows and sixteen words at a time: [word][row].
  static void turn_queries(float* queries, size_t rows, size_t steps) {
    for (size_t row = 0; row < rows; row += kLanes) {
      for (size_t step = 0; step < steps; step += kLanes) {
        float* at = queries + row * steps + step;
        Lanes block[kLanes];
        for (size_t i = 0; i < kLanes; ++i) block[i] = load(at + i * steps);
        transpose(block);
        for (size_t i = 0; i < kLanes; ++i) store(at + i * steps, block[i]);
      }
    }
  }

  // Of all four vectors of a block, whatever lies in the last of them. Rows beyond call.rows, up to
  // a multiple of sixteen, are computed of whatever is there.
  static void score(const Score<uint16_t>& given) {
    const Score<uint16_t> call = given;  // apart from what is stored
    tiles_read_memory();
    const size_t lines = call.steps * kWordBytes, vector = call.steps * kLanes;
    size_t line = lines / 2;
    for (size_t row = 0; row < call.rows; row += kLanes) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (size_t step = 0; step < call.steps; step += kTilePairs) {
        if (row == 0) {
          for (size_t i = 0; i < 2 * kLanes && line < lines; ++i) call.ahead.fetch(line++);
        }
        const float* keys = call.keys + step * kLanes;
        _tile_loadd(6, call.queries + row * call.steps + step, call.steps * kWordBytes);
        _tile_loadd(4, keys, kTileRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, keys + vector, kTileRowBytes);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, keys + 2 * vector, kTileRowBytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, keys + 3 * vector, kTileRowBytes);
        _tile_dpbf16ps(3, 5, 6);
      }
      Lanes found[kBlock / kLanes][kLanes];  // [key][row]
      _tile_stored(0, found[0], kTileRowBytes);
      _tile_stored(1, found[1], kTileRowBytes);
      _tile_stored(2, found[2], kTileRowBytes);
      _tile_stored(3, found[3], kTileRowBytes);
      const size_t rows = std::min(kLanes, call.rows - row);
      for (size_t v = 0; v < kBlock / kLanes; ++v) {
        transpose(found[v]);
        float* to = call.scores + row * kPiece + v * kLanes;
        for (size_t i = 0; i < rows; ++i) store(to + i * kPiece, found[v][i]);
      }
    }
  }

  static void mix(const Mix<uint16_t>& given) {
    const Mix<uint16_t> call = given;                 // apart from what is stored
    auto* pairs = static_cast<float*>(call.scratch);  // [kBlock / 2][width]
    size_t line = 0;
    const size_t whole = call.size / kWidth * kWidth;
    for (size_t j = 0; j < kBlock; j += kPack) {
      const uint16_t *first = call.values[j], *second = call.values[j + 1];
      float* to = pairs + j / kPack * call.width;
      for (size_t at = 0; at < whole; at += kWidth) {
        call.ahead.fetch(line++);
        call.ahead.fetch(line++);
        pair(load(first + at), load(second + at), to + at);
      }
      if (const size_t rest = call.size - whole; rest > 0) {
        pair(words(first + whole, rest), words(second + whole, rest), to + whole);
      }
    }
    tiles_read_memory();
    static_assert(kBlock / kPack == 2 * kTilePairs);
    const size_t stride = call.width * kWordBytes;
    for (size_t row = 0; row < call.rows; row += kLanes) {
      const float* weights = call.weights + row * kPiece;
      _tile_loadd(6, weights, kPiece * kWordBytes);
      _tile_loadd(7, weights + kTilePairs, kPiece * kWordBytes);
      const float *low = pairs, *high = pairs + kTilePairs * call.width;
      float* sums = call.sums + row * call.width;
      for (size_t at = 0; at < call.width; at += 2 * kLanes) {
        _tile_loadd(0, sums + at, stride);
        _tile_loadd(1, sums + at + kLanes, stride);
        _tile_loadd(4, low + at, stride);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, low + at + kLanes, stride);
        _tile_dpbf16ps(1, 6, 5);
        _tile_loadd(4, high + at, stride);
        _tile_dpbf16ps(0, 7, 4);
        _tile_loadd(5, high + at + kLanes, stride);
        _tile_dpbf16ps(1, 7, 5);
        _tile_stored(0, sums + at, stride);
        _tile_stored(1, sums + at + kLanes, stride);
      }
    }
  }

  // Sixteen sums of even elements, then of odd ones, in the elements' order.
  static void in_order(Lanes& first, Lanes& second) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const auto even = reinterpret_cast<__m512>(first), odd = reinterpret_cast<__m512>(second);
    first = reinterpret_cast<Lanes>(_mm512_permutex2var_ps(even, low, odd));
    second = reinterpret_cast<Lanes>(_mm512_permutex2var_ps(even, high, odd));
  }

 private:
  // Of 32 elements of two keys' values: the pairs of the even elements, then of the odd ones.
  static void pair(Lanes first, Lanes second, float* to) {
    const auto a = reinterpret_cast<WordLanes>(first), b = reinterpret_cast<WordLanes>(second);
    store(to, reinterpret_cast<Lanes>((a & 0xffffu) | b << 16));
    store(to + kLanes, reinterpret_cast<Lanes>(a >> 16 | (b & 0xffff0000u)));
  }
};

void amx_attend(const Attend& call, Workspace& workspace) {
  call.type == Type::kBfloat16 ? attend<TilesMath>(call, workspace)
                               : kAvx512Kernels.attend(call, workspace);
}

}  // namespace

const Kernels kAmxKernels = {amx_attend};

}  // namespace kvc2::attention
