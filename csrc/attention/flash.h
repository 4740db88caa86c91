// The shape that all instruction sets share. A row is one query head of one token; up to kTile rows
// of one sequence and KV head make a tile. A tile meets one piece of the context after the other:
//
//   scores   [rows][kPiece] of its queries with the piece's keys, block by block
//   weights  the softmax of each row over what it sees of the piece, in the place of the scores
//   sums     [rows][width] of the weights with the values, block by block
//   merge    the piece's sums into the tile's, in the order of the pieces
//
// Where there are too few tiles for the threads, the pieces of a tile are shared out too and merged
// afterwards: the same sums in the same order. A block's keys are turned, so that a lane is a key;
// values stay as they are, a lane an element; so no sum but a row's total runs across lanes. While
// a block is computed a later one is fetched from memory, a line now and then. What is multiplied
// are words of 4 bytes: a float, or a pair of bfloat16. A `Math` supplies:
//
//   Element, kPack         what pages hold, and how many of them make a word
//   words(from, count)     sixteen words of `count` elements, zeros behind
//   turn(keys, at, count, to)  sixteen words of the elements [at, at + count) of each of sixteen
//                          keys, zeros behind: to[word][key]
//   pack(weights, to)      sixteen weights as words
//   score(Score), mix(Mix) the products
//   Held                   what a thread holds while it computes
//
// It may have turn_queries(queries, rows, steps), which changes how the words of a tile's queries
// lie, and in_order(first, second), where `mix` leaves 32 sums of a row in another order.
#pragma once

#include <algorithm>
#include <cstddef>

#include "attention/attention.h"
#include "base/lanes.h"

namespace kvc2::attention {
namespace {

constexpr size_t kBlock = 64;       // keys that are turned at once: they stay in the first cache
constexpr size_t kTile = 64;        // rows that share the turning
constexpr size_t kWidth = 32;       // of which a row of sums is a multiple
constexpr float kNothing = -3e38f;  // the score of what isn't seen

// A block of keys or values that comes later: line i is line i / kBlock of row i % kBlock.
template <class T>
struct Ahead {
  const T* const* rows;  // [kBlock]

  // Into the second cache: in the first it would displace what is being computed.
  void fetch(size_t line) const {
    __builtin_prefetch(rows[line % kBlock] + line / kBlock * (64 / sizeof(T)), 0, 2);
  }
};

// scores[r][j] = queries[r] . keys[j], for `rows` rows and `vectors` times sixteen keys or a few
// more; rows of scores are kPiece apart. Fetches the second half of `ahead`.
template <class T>
struct Score {
  size_t rows, vectors, steps;  // steps: words of a key, a multiple of sixteen
  const float* queries;         // words [rows][steps]
  const float* keys;            // words [vectors][steps][16]
  float* scores;
  Ahead<T> ahead;
};

// sums[r][d] += sum over j of weights[r][j] values[j][d]; rows of weights are kPiece words apart.
// Fetches `ahead`.
template <class T>
struct Mix {
  size_t rows, count, size, width;  // count: of values; size: of a value; width: of a row of sums
  const float* weights;             // words; 0 behind `count`, up to kBlock
  const T* const* values;           // [kBlock], zeros behind `count`
  float* sums;                      // [rows][width]
  Ahead<T> ahead;
  void* scratch;  // kBlock rows of width words
};

// Rows of one sequence and KV head.
struct Tile {
  size_t sequence, head;
  size_t first_token;             // of the whole batch, where the sequence's queries begin
  size_t first_row, rows;         // a row is token * group + query head within the group
  size_t first_piece, end_piece;  // of the context, what its rows see
  size_t first_part;              // how many pieces the tiles before it have

  // The positions that a row sees.
  struct Seen {
    size_t begin, end;
  };
  Seen seen(const Attend& call, size_t row) const {
    const size_t group = call.query_heads / call.keys.kv_heads, window = call.scores.window;
    const auto context = static_cast<size_t>(call.context_lens[sequence]);
    const auto queries = static_cast<size_t>(call.query_lens[sequence]);
    const size_t end = context - queries + (first_row + row) / group + 1;
    return {window > 0 && end > window ? end - window : 0, end};
  }
};

// What a tile's rows have of some pieces: the highest score, the total weight and the sums, both of
// weights exp(score - highest).
struct Part {
  float* highest;  // [kTile]
  float* total;    // [kTile]
  float* sums;     // [rows][width]

  static size_t bytes(size_t rows, size_t width) { return (2 * kTile + rows * width) * 4; }
  static Part at(void* memory) {
    auto* from = static_cast<float*>(memory);
    return {from, from + kTile, from + 2 * kTile};
  }
};

inline size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

inline float highest_of(Lanes x) {
  float best = x[0];
  for (size_t i = 1; i < kLanes; ++i) best = std::max(best, x[i]);
  return best;
}

// c * tanh(x / c)
inline Lanes capped(Lanes x, float c) {
  const Lanes twice = x * (2.0f / c), most = broadcast(80.0f);  // e^80 is as good as no end
  return c - 2.0f * c / (exponential(twice < most ? twice : most) + 1.0f);
}

template <class Math>
class TileRun {
 public:
  using T = typename Math::Element;

  // What a thread keeps while it computes: see the constructor.
  static size_t bytes(const Attend& call) {
    const size_t steps = steps_of(call), width = width_of(call);
    const size_t words = (kTile + kBlock) * steps + kBlock * width + kTile * kPiece;
    return words * 4 + 2 * Part::bytes(kTile, width) + zero_bytes(call) + 3 * kPiece * sizeof(T*);
  }

  // A row's sums in a Part, in floats.
  static size_t width_of(const Attend& call) { return round_up(call.values.size, kWidth); }

  TileRun(const Attend& call, void* memory)
      : call_(call),
        group_(call.query_heads / call.keys.kv_heads),
        steps_(steps_of(call)),
        width_(width_of(call)),
        queries_(static_cast<float*>(memory)),
        keys_(queries_ + kTile * steps_),
        values_(keys_ + kBlock * steps_),
        scores_(values_ + kBlock * width_),
        part_(Part::at(scores_ + kTile * kPiece)),
        whole_(Part::at(part_.sums + kTile * width_)),
        zeros_(whole_.sums + kTile * width_),
        rows_(reinterpret_cast<const T**>(zeros_ + zero_bytes(call) / 4)) {
    std::memset(zeros_, 0, zero_bytes(call));
  }

  // All of a tile.
  void run(const Tile& tile) {
    begin(tile);
    clear(whole_);
    for (size_t piece = tile.first_piece; piece < tile.end_piece; ++piece) {
      compute(piece, piece + 1 < tile.end_piece, part_);
      merge(part_);
    }
    finish();
  }

  // One piece of a tile; more: the next one comes next.
  void run(const Tile& tile, size_t piece, bool more, const Part& to) {
    begin(tile);
    compute(piece, more, to);
  }

  // A tile of which all pieces are computed: piece i is at `parts + i * bytes`.
  void join(const Tile& tile, const std::byte* parts, size_t bytes) {
    tile_ = tile;
    clear(whole_);
    for (size_t i = 0; i < tile.end_piece - tile.first_piece; ++i) {
      merge(Part::at(const_cast<std::byte*>(parts + i * bytes)));
    }
    finish();
  }

 private:
  static size_t steps_of(const Attend& call) {
    return round_up((call.keys.size + Math::kPack - 1) / Math::kPack, kLanes);
  }

  static size_t zero_bytes(const Attend& call) {
    return round_up(std::max(call.keys.size, call.values.size) * sizeof(T), 64);
  }

  size_t token_of(size_t row) const { return (tile_.first_row + row) / group_; }
  size_t head_of(size_t row) const {
    return tile_.head * group_ + (tile_.first_row + row) % group_;
  }
  // Where a row lies in query and output, in rows of these.
  size_t place_of(size_t row) const {
    return (tile_.first_token + token_of(row)) * call_.query_heads + head_of(row);
  }

  void begin(const Tile& tile) {
    tile_ = tile;
    const size_t size = call_.keys.size;
    for (size_t row = 0; row < tile.rows; ++row) {
      const T* from = static_cast<const T*>(call_.query) + place_of(row) * size;
      for (size_t step = 0; step < steps_; step += kLanes) {
        const size_t at = step * Math::kPack, some = std::min(size - at, kLanes * Math::kPack);
        store(queries_ + row * steps_ + step, Math::words(from + at, some));
      }
    }
    if constexpr (requires { Math::turn_queries(queries_, tile.rows, steps_); }) {
      Math::turn_queries(queries_, tile.rows, steps_);
    }
  }

  void clear(const Part& part) const {
    std::fill_n(part.highest, kTile, kNothing);
    std::fill_n(part.total, kTile, 0.0f);
    std::fill_n(part.sums, tile_.rows * width_, 0.0f);
  }

  // The positions of a piece that some row of the tile sees, from the beginning of a block on.
  struct Range {
    size_t first, begin, end;  // first: of the piece
    size_t count(size_t at) const { return std::min(kBlock, end - at); }
    size_t rows() const { return round_up(end - begin, kBlock); }
  };
  Range range_of(size_t piece) const {
    const size_t first = piece * kPiece, seen = tile_.seen(call_, 0).begin;
    return {first, std::max(first, seen / kBlock * kBlock),
            std::min(first + kPiece, tile_.seen(call_, tile_.rows - 1).end)};
  }

  // more: the next piece of the tile comes next.
  void compute(size_t piece, bool more, const Part& to) {
    const Range range = range_of(piece);
    find(call_.key, call_.keys, range, rows_);
    find(call_.value, call_.values, range, rows_ + range.rows());
    const T** after = rows_ + 2 * range.rows();
    if (more) {
      find(call_.key, call_.keys, range_of(piece + 1), after);
    } else {
      std::fill_n(after, kBlock, rows_[0]);
    }
    const size_t blocks = range.rows() / kBlock;
    // Of the blocks of keys, of values, and the next piece's first.
    const auto ahead = [&](size_t block) {
      return Ahead<T>{rows_ + std::min(block, 2 * blocks) * kBlock};
    };
    clear(to);
    for (size_t i = 0; i < blocks; ++i) {
      const size_t at = range.begin + i * kBlock, count = range.count(at);
      turn_keys(rows_ + i * kBlock, count, ahead(i + 1));
      Math::score({tile_.rows, round_up(count, kLanes) / kLanes, steps_, queries_, keys_,
                   scores_ + (at - range.first), ahead(i + 1)});
    }
    for (size_t row = 0; row < tile_.rows; ++row) weigh(row, range, ahead(blocks + 1), to);
    for (size_t i = 0; i < blocks; ++i) {
      const size_t at = range.begin + i * kBlock;
      Math::mix({tile_.rows, range.count(at), call_.values.size, width_,
                 scores_ + (at - range.first) / Math::kPack, rows_ + (blocks + i) * kBlock, to.sums,
                 ahead(blocks + i + 2), values_});
    }
  }

  // Where the range's keys or values lie; behind them are zeros, up to a whole block.
  void find(const void* base, const Pages& pages, const Range& range, const T** rows) const {
    const int32_t* table = call_.block_tables + tile_.sequence * call_.max_pages;
    const size_t count = range.end - range.begin;
    size_t page = range.begin / pages.page_size, slot = range.begin % pages.page_size, i = 0;
    while (i < count) {
      const size_t id = static_cast<size_t>(table[page]) * pages.kv_heads + tile_.head;
      const T* from = static_cast<const T*>(base) + (id * pages.page_size + slot) * pages.stride;
      for (; i < count && slot < pages.page_size; ++i, ++slot, from += pages.stride) rows[i] = from;
      ++page, slot = 0;
    }
    for (; i < range.rows(); ++i) rows[i] = reinterpret_cast<const T*>(zeros_);
  }

  // Fetches the first half of `ahead`.
  void turn_keys(const T* const* rows, size_t count, const Ahead<T>& ahead) {
    constexpr size_t kWhole = kLanes * Math::kPack, kLines = 8;
    size_t line = 0;
    for (size_t key = 0; key < count; key += kLanes) {
      float* to = keys_ + key * steps_;
      for (size_t d = 0; d < call_.keys.size; d += kWhole, to += kLanes * kLanes) {
        const size_t some = std::min(kWhole, call_.keys.size - d);
        for (size_t i = 0; i < kLines; ++i) ahead.fetch(line++);
        some == kWhole ? Math::turn(rows + key, d, kWhole, to)
                       : Math::turn(rows + key, d, some, to);
      }
    }
  }

  // The row's scores with the keys of a range become weights.
  void weigh(size_t row, const Range& range, const Ahead<T>& ahead, const Part& to) {
    const Scores& how = call_.scores;
    const Tile::Seen seen = tile_.seen(call_, row);
    float* scores = scores_ + row * kPiece;
    const size_t begin = range.begin - range.first;
    const size_t end = round_up(range.end - range.first, kBlock);
    const bool all = seen.begin <= range.begin && seen.end >= range.first + end;
    float scale = how.scale;
    if (how.soft_cap > 0) {
      for (size_t at = begin; at < end; at += kLanes) {
        store(scores + at, capped(load(scores + at) * scale, how.soft_cap));
      }
      scale = 1;
    }
    const float highest = all ? highest_score<true>(scores, begin, end, scale, range, seen)
                              : highest_score<false>(scores, begin, end, scale, range, seen);
    // of a row that sees nothing: weights of 0
    const Register top = Register{} + (highest > kNothing ? highest : 0.0f);
    Register total[kRegisters] = {};
    for (size_t at = begin; at < end; at += kLanes) {
#pragma GCC unroll 4
      for (size_t p = 0; p < kRegisters; ++p) {
        float* score = scores + at + p * kRegisterLanes;
        const Register weight = exponential_of(load_register(score) - top);
        total[p] += weight;
        store_register(score, weight);
      }
      if constexpr (Math::kPack > 1) Math::pack(load(scores + at), scores + at / Math::kPack);
      if (row < kFetching) {
        for (size_t i = 0; i < 2; ++i) ahead.fetch((row * kPiece + at) / kLanes * 2 + i);
      }
    }
    to.highest[row] = highest;
    to.total[row] = sum(load(total));
  }

  // Scales the scores of a range, and leaves nothing of those that the row doesn't see.
  template <bool all>
  static float highest_score(float* scores, size_t begin, size_t end, float scale,
                             const Range& range, const Tile::Seen& seen) {
    const auto low = static_cast<int32_t>(seen.begin), high = static_cast<int32_t>(seen.end);
    const Register nothing = Register{} + kNothing;
    Register best[kRegisters];
    std::fill_n(best, kRegisters, nothing);
    IntRegister lane;
    for (size_t i = 0; i < kRegisterLanes; ++i) lane[i] = static_cast<int32_t>(i);
    for (size_t at = begin; at < end; at += kLanes) {
#pragma GCC unroll 4
      for (size_t p = 0; p < kRegisters; ++p) {
        const size_t place = at + p * kRegisterLanes;
        Register score = load_register(scores + place) * scale;
        if constexpr (!all) {
          const IntRegister position = lane + static_cast<int32_t>(range.first + place);
          score = (position >= low) & (position < high) ? score : nothing;
        }
        store_register(scores + place, score);
        best[p] = score > best[p] ? score : best[p];
      }
    }
    return highest_of(load(best));
  }

  void merge(const Part& part) {
    for (size_t row = 0; row < tile_.rows; row += kLanes) {
      const Lanes before = load(whole_.highest + row), now = load(part.highest + row);
      const Lanes best = maximum(before, now);
      const Lanes keep = exponential(before - best), add = exponential(now - best);
      store(whole_.highest + row, best);
      store(whole_.total + row, load(whole_.total + row) * keep + load(part.total + row) * add);
      for (size_t i = row; i < std::min(row + kLanes, tile_.rows); ++i) {
        const float a = keep[i - row], b = add[i - row];
        for (size_t d = i * width_; d < (i + 1) * width_; d += kLanes) {
          store(whole_.sums + d, load(whole_.sums + d) * a + load(part.sums + d) * b);
        }
      }
    }
  }

  void finish() {
    const size_t size = call_.values.size;
    for (size_t row = 0; row < tile_.rows; ++row) {
      float share = 1.0f, total = whole_.total[row];
      if (call_.scores.sinks != nullptr) {
        const float sink = call_.scores.sinks[head_of(row)], highest = whole_.highest[row];
        const float best = std::max(sink, highest);
        share = exponential(broadcast(highest - best))[0];
        total = total * share + exponential(broadcast(sink - best))[0];
      }
      T* to = static_cast<T*>(call_.output) + place_of(row) * size;
      for (size_t d = 0; d < size; d += kWidth) {
        const float* sums = whole_.sums + row * width_ + d;
        Lanes low = load(sums), high = load(sums + kLanes);
        if constexpr (requires { Math::in_order(low, high); }) Math::in_order(low, high);
        store_some(to + d, low * share / total, std::min(kLanes, size - d));
        if (size > d + kLanes) {
          store_some(to + d + kLanes, high * share / total, std::min(kLanes, size - d - kLanes));
        }
      }
    }
  }

  static constexpr size_t kFetching = 8;  // rows that fetch two lines for sixteen scores
  [[no_unique_address]] typename Math::Held held_{};
  const Attend& call_;
  const size_t group_, steps_, width_;
  float* const queries_;  // words [kTile][steps]
  float* const keys_;     // words [kBlock / 16][steps][16]
  float* const values_;   // for mix()
  float* const scores_;   // [kTile][kPiece], then weights as words
  const Part part_, whole_;
  float* const zeros_;    // a key, or a value
  const T** const rows_;  // of the keys, then the values of a piece, then a block of keys
  Tile tile_{};
};

// Calls `use` with each tile of the call.
template <class Use>
void for_tiles(const Attend& call, const Use& use) {
  const size_t group = call.query_heads / call.keys.kv_heads;
  Tile tile{};
  for (tile.sequence = 0; tile.sequence < call.sequences; ++tile.sequence) {
    const auto tokens = static_cast<size_t>(call.query_lens[tile.sequence]);
    for (tile.first_row = 0; tile.first_row < tokens * group; tile.first_row += kTile) {
      tile.rows = std::min(kTile, tokens * group - tile.first_row);
      tile.first_piece = tile.seen(call, 0).begin / kPiece;
      tile.end_piece = (tile.seen(call, tile.rows - 1).end + kPiece - 1) / kPiece;
      for (tile.head = 0; tile.head < call.keys.kv_heads; ++tile.head) {
        use(tile);
        tile.first_part += tile.end_piece - tile.first_piece;
      }
    }
    tile.first_token += tokens;
  }
}

template <class Math>
class AttendRun {
 public:
  AttendRun(const Attend& call, Workspace& workspace)
      : call_(call), team_(workspace.team), run_bytes_(round_up(Run::bytes(call), 64)) {
    size_t rows = 0;
    for_tiles(call, [&](const Tile& tile) {
      ++count_, rows = std::max(rows, tile.rows);
      pieces_ = tile.first_part + tile.end_piece - tile.first_piece;
    });
    part_bytes_ = Part::bytes(round_up(rows, kLanes), Run::width_of(call));
    const size_t tiles = round_up(count_ * sizeof(Tile), 64), runs = team_.threads() * run_bytes_;
    const size_t parts = apart() ? pieces_ * part_bytes_ : 0;
    runs_ = static_cast<std::byte*>(workspace.scratch.reserve(runs + tiles + parts));
    tiles_ = reinterpret_cast<Tile*>(runs_ + runs);
    parts_ = runs_ + runs + tiles;
    Tile* next = tiles_;
    for_tiles(call, [&](const Tile& tile) { *next++ = tile; });
  }

  void run() {
    if (!apart()) {
      team_.parallel_for(count_, 1, [&](size_t begin, size_t end, size_t thread) {
        Run run = run_of(thread);
        // the last of a chunk see most: they go first
        for (size_t i = begin; i < end; ++i) run.run(tiles_[count_ - 1 - i]);
      });
      return;
    }
    // some pieces of a tile in a row, so that one can fetch the next
    const size_t grain = std::clamp<size_t>(pieces_ / (kFewTiles * team_.threads()), 1, kFewTiles);
    team_.parallel_for(pieces_, grain, [&](size_t begin, size_t end, size_t thread) {
      Run run = run_of(thread);
      for (size_t i = begin; i < end; ++i) {
        const Tile& tile = tile_of(i);
        const size_t piece = tile.first_piece + i - tile.first_part;
        const bool more = i + 1 < end && piece + 1 < tile.end_piece;
        run.run(tile, piece, more, Part::at(parts_ + i * part_bytes_));
      }
    });
    team_.parallel_for(count_, 1, [&](size_t begin, size_t end, size_t thread) {
      Run run = run_of(thread);
      for (size_t i = begin; i < end; ++i) {
        run.join(tiles_[i], parts_ + tiles_[i].first_part * part_bytes_, part_bytes_);
      }
    });
  }

 private:
  using Run = TileRun<Math>;
  static constexpr size_t kFewTiles = 8;           // a thread: more are shared evenly enough
  static constexpr size_t kPartsBytes = 64 << 20;  // beyond, writing them costs more than it brings

  bool apart() const {
    const size_t threads = team_.threads();
    return threads > 1 && count_ < kFewTiles * threads && pieces_ * part_bytes_ <= kPartsBytes;
  }

  Run run_of(size_t thread) const { return Run(call_, runs_ + thread * run_bytes_); }

  const Tile& tile_of(size_t part) const {
    size_t low = 0, high = count_;
    while (high - low > 1) {
      const size_t middle = (low + high) / 2;
      (tiles_[middle].first_part <= part ? low : high) = middle;
    }
    return tiles_[low];
  }

  const Attend& call_;
  ThreadTeam& team_;
  const size_t run_bytes_;
  size_t count_ = 0, pieces_ = 0, part_bytes_ = 0;
  std::byte* runs_;   // [threads][run_bytes]
  Tile* tiles_;       // [count]
  std::byte* parts_;  // [pieces][part_bytes], if they are computed apart
};

template <class Math>
void attend(const Attend& call, Workspace& workspace) {
  AttendRun<Math>(call, workspace).run();
}

}  // namespace
}  // namespace kvc2::attention
