// The next token of each row of logits: the best one, or one that is drawn. A row's token depends
// on its own logits and its own Sampling, the same on every machine. Nothing is sorted: a row costs
// a few passes over it, and no memory that isn't kept.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/workspace.h"

namespace kvc2::decoder {

constexpr int64_t kMostTokens = 1 << 24;             // of a vocabulary
constexpr double kColdest = 1e-37, kHottest = 1e30;  // temperatures; all beyond are as these

// Of equal logits the lower token id is the better one. Temperature comes first, then top-k; of
// those that it leaves, min-p and top-p: a token must pass both.
struct Sampling {
  float temperature;        // 0: the best token; else kColdest to kHottest
  size_t top_k;             // the k best; 0: all
  double top_p;             // in (0, 1]: the fewest best ones whose probabilities reach it
  float min_p;              // in [0, 1]: those at least this times as probable as the best
  uint64_t seed, position;  // of the stream of numbers, and in it
};

constexpr int64_t kNoToken = -1;  // of a row with NaN or +infinity, or with nothing over -infinity

struct Sample {
  size_t rows, vocabulary;
  const float* logits;     // [any, vocabulary]; -infinity: never chosen
  const int64_t* row_ids;  // [rows], of logits
  const Sampling* how;     // [rows]
  int64_t* tokens;         // [rows]
};

void sample(const Sample& call, Workspace& workspace);

}  // namespace kvc2::decoder
