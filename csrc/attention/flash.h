// The shape that all instruction sets share. A row is one query head of one token; sixteen rows
// that share a KV head make a tile, and a lane is a row, so that maxima, exponentials and sums
// need no work across lanes. Scores are computed transposed: [keys][16 rows].
//
// A piece of work is up to kTiles tiles of one sequence and KV head: each block of keys is loaded
// once for all of them. A `Math` supplies:
//
//   Element, panel_bytes(dim)
//   pack(rows, dim, panel)                   sixteen queries (null: zeros), transposed
//   Block(dim)                               a block of K and V in the form the sums want
//   block.load(key rows, value rows, count)  rows beyond `count` are taken as zero
//   block.score(panel, scores)               scores[j] = K[j] . query, for the rows loaded
//   block.mix(weights, sums)                 sums[d] += sum over j of weights[j] V[j][d]
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "attention/attention.h"
#include "base/lanes.h"

namespace kvc2::attention {
namespace {

constexpr size_t kTiles = 16;  // 256 rows: their sums stay in the second cache

// Some tiles of one sequence and KV head.
struct Piece {
  size_t sequence, first_token;  // of the whole batch, where the sequence's queries begin
  size_t head, first_row, rows;  // a row is token * group + query head within the group
};

inline std::vector<Piece> pieces(const Attend& call) {
  const size_t group = call.query_heads / call.shape.kv_heads;
  std::vector<Piece> all;
  size_t token = 0;
  for (size_t s = 0; s < call.sequences; ++s) {
    const auto tokens = static_cast<size_t>(call.query_lens[s]);
    for (size_t row = 0; row < tokens * group; row += kTiles * kLanes) {
      const size_t rows = std::min(kTiles * kLanes, tokens * group - row);
      for (size_t h = 0; h < call.shape.kv_heads; ++h) all.push_back({s, token, h, row, rows});
    }
    token += tokens;
  }
  return all;
}

template <class Math>
class PieceRun {
 public:
  using T = typename Math::Element;

  explicit PieceRun(const Attend& call)
      : call_(call),
        dim_(call.shape.head_dim),
        group_(call.query_heads / call.shape.kv_heads),
        block_(dim_),
        panels_(kTiles * Math::panel_bytes(dim_) / sizeof(Line)),
        sums_(kTiles * dim_) {}

  void run(const Piece& piece) {
    piece_ = piece;
    context_ = static_cast<size_t>(call_.context_lens[piece.sequence]);
    before_ = context_ - static_cast<size_t>(call_.query_lens[piece.sequence]);
    tiles_ = (piece.rows + kLanes - 1) / kLanes;
    for (size_t t = 0; t < tiles_; ++t) begin_tile(t);
    const size_t keys = static_cast<size_t>(last_[tiles_ - 1]) + 1;
    for (size_t first = 0; first < keys; first += kBlock) {
      const size_t count = load_block(first);
      for (size_t t = 0; t < tiles_; ++t) {
        if (static_cast<size_t>(last_[t]) >= first) add_block(t, first, count);
      }
    }
    for (size_t t = 0; t < tiles_; ++t) end_tile(t);
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };

  size_t rows_of(size_t tile) const { return std::min(kLanes, piece_.rows - tile * kLanes); }

  size_t token_of(size_t tile, size_t lane) const {
    return (piece_.first_row + tile * kLanes + lane) / group_;
  }

  // Where a row lies in query and output.
  size_t offset_of(size_t tile, size_t lane) const {
    const size_t row = piece_.first_row + tile * kLanes + lane;
    const size_t head = piece_.head * group_ + row % group_;
    return ((piece_.first_token + row / group_) * call_.query_heads + head) * dim_;
  }

  std::byte* panel(size_t tile) { return panels_.data()->bytes + tile * Math::panel_bytes(dim_); }

  void begin_tile(size_t tile) {
    const T* rows[kLanes] = {};
    IntLanes positions = {};  // of lanes without a row: any that exists
    const size_t count = rows_of(tile);
    for (size_t lane = 0; lane < count; ++lane) {
      rows[lane] = static_cast<const T*>(call_.query) + offset_of(tile, lane);
      positions[lane] = static_cast<int32_t>(before_ + token_of(tile, lane));
    }
    Math::pack(rows, dim_, panel(tile));
    positions_[tile] = positions;
    first_[tile] = count == kLanes ? positions[0] : 0;
    last_[tile] = positions[count - 1];
    maxima_[tile] = broadcast(-3e38f);
    totals_[tile] = Lanes{};
    std::fill_n(sums_.begin() + static_cast<ptrdiff_t>(tile * dim_), dim_, Lanes{});
  }

  // Fills the block from the pages of positions [first, first + kBlock) that exist.
  size_t load_block(size_t first) {
    const size_t count = std::min(kBlock, context_ - first), page_size = call_.shape.page_size;
    const int32_t* table = call_.block_tables + piece_.sequence * call_.max_pages;
    const T* keys[kBlock];
    const T* values[kBlock];
    for (size_t j = 0; j < count; ++j) {
      const size_t position = first + j, page = static_cast<size_t>(table[position / page_size]);
      const size_t slot = (page * call_.shape.kv_heads + piece_.head) * page_size;
      const size_t offset = (slot + position % page_size) * dim_;
      keys[j] = static_cast<const T*>(call_.key) + offset;
      values[j] = static_cast<const T*>(call_.value) + offset;
    }
    block_.load(keys, values, count);
    return count;
  }

  void add_block(size_t tile, size_t first, size_t count) {
    Lanes scores[kBlock];
    block_.score(panel(tile), scores);
    const bool masked = first + count > static_cast<size_t>(first_[tile]) + 1;
    Lanes best = maxima_[tile];
    for (size_t j = 0; j < count; ++j) {
      Lanes score = scores[j] * call_.scale;
      if (masked) {
        const IntLanes seen = positions_[tile] >= static_cast<int32_t>(first + j);
        score = seen ? score : broadcast(-3e38f);
      }
      scores[j] = score;
      best = maximum(score, best);
    }
    const Lanes shrink = exponential(maxima_[tile] - best);
    maxima_[tile] = best;
    Lanes total = totals_[tile] * shrink;
    for (size_t j = 0; j < count; ++j) {
      scores[j] = exponential(scores[j] - best);
      total += scores[j];
    }
    totals_[tile] = total;
    for (size_t j = count; j < kBlock; ++j) scores[j] = Lanes{};
    Lanes* sums = sums_.data() + tile * dim_;
    for (size_t d = 0; d < dim_; ++d) sums[d] *= shrink;
    block_.mix(scores, sums);
  }

  void end_tile(size_t tile) {
    const Lanes* sums = sums_.data() + tile * dim_;
    for (size_t d = 0; d < dim_; d += kLanes) {
      const size_t count = std::min(kLanes, dim_ - d);
      Lanes rows[kLanes] = {};
      for (size_t i = 0; i < count; ++i) rows[i] = sums[d + i] / totals_[tile];
      transpose(rows);
      for (size_t lane = 0; lane < rows_of(tile); ++lane) {
        store_some(static_cast<T*>(call_.output) + offset_of(tile, lane) + d, rows[lane], count);
      }
    }
  }

  const Attend& call_;
  const size_t dim_, group_;
  typename Math::Block block_;
  std::vector<Line> panels_;
  std::vector<Lanes> sums_;  // [tiles][dim]
  Piece piece_{};
  size_t context_ = 0, before_ = 0, tiles_ = 0;
  IntLanes positions_[kTiles];
  int32_t first_[kTiles], last_[kTiles];  // the least and the greatest position of a tile
  Lanes maxima_[kTiles], totals_[kTiles];
};

template <class Math>
void attend(const Attend& call, Workspace& workspace) {
  const std::vector<Piece> all = pieces(call);
  workspace.team.parallel_for(all.size(), 1, [&](size_t begin, size_t end) {
    PieceRun<Math> run(call);
    for (size_t i = begin; i < end; ++i) run.run(all[i]);
  });
}

}  // namespace
}  // namespace kvc2::attention
