// What a decoder's step computes around its products and its attention: norms, sums with the
// residual, rotation, the place of new K and V, the choice of experts. A layer up to its experts is
// one call, so that a step crosses into Python twice a layer and keeps its arrays.
//
// A row's result depends on its own token only, as in experts/ and attention/: each sum runs over a
// row in one fixed order. Not responsible for feed-forwards (experts/), nor for choosing tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/attention.h"
#include "base/cpu.h"
#include "base/workspace.h"
#include "experts/experts.h"

namespace kvc2::decoder {

using experts::Type;

// y[r] = weight * x[r] / rms(x[r]) (arXiv 1910.07467), over rows of `size`; first x[r] += add[r].
// Rounded where torch rounds: the sum, the normed x, the product.
struct Norm {
  Type type;  // of all
  size_t size;
  float eps;
  const void* add;     // [rows, size], or null
  const void* weight;  // [size]
  void* x;             // [rows, size]
  void* y;             // [rows, size]
};

// Splits qkv, norms its queries and keys where there are weights for that, turns both by their
// positions (arXiv 2104.09864, halves), and puts keys and values into their pages.
struct Place {
  Type type;
  size_t query_heads;
  attention::Pages pages;  // of keys and of values
  float eps;
  const void* query_weight;  // [head size], or null
  const void* key_weight;    // [head size], or null
  const float* cosines;      // [positions, head size / 2]
  const float* sines;
  const int64_t* positions;  // [tokens]
  const int64_t* page_ids;   // [tokens]
  const int64_t* offsets;    // [tokens]
  const void* qkv;           // [tokens, query heads + 2 * KV heads, head size]
  void* query;               // [tokens, query heads, head size]
  void* keys;                // the pages
  void* values;
};

enum class Scoring { kSoftmax, kSigmoid };

// How a token's experts are chosen of its logits, and how their outputs are weighed:
//   scores = softmax or sigmoid of the logits (with `bias` added to them)
//   chosen = the k best of scores + selection_bias, ties to the lower id, within the best groups
//   weights = scores of the chosen, best first, made to sum to 1 if `normalize`, times `scale`
// A group of consecutive experts is worth its best, or the sum of its two best where there is a
// selection bias (arXiv 2405.04434, 2412.19437).
struct Choice {
  Type type;  // of logits
  size_t experts, chosen;
  Scoring scoring;
  bool normalize;
  float scale;
  size_t groups, chosen_groups;  // 1, 1: no groups
  const float* bias;             // [experts], or null
  const float* selection_bias;   // [experts], or null
  const void* logits;            // [tokens, experts]
  int64_t* expert_ids;           // [tokens, chosen]
  float* weights;                // [tokens, chosen]
};

constexpr size_t kMostExperts = 1024;

// Each computes the rows [begin, end).
struct Kernels {
  void (*norm)(const Norm&, size_t begin, size_t end);
  void (*place)(const Place&, size_t begin, size_t end);
  void (*choose)(const Choice&, size_t begin, size_t end);
};

// The kernels for an instruction set, which the machine must have.
const Kernels& kernels(Isa isa);

extern const Kernels kPortableKernels, kAvx2Kernels, kAvx512Kernels;

// What a model's layers share.
struct Shape {
  Type type;
  size_t hidden, query_heads, kv_heads, head_size, page_size, pages;
  float eps;
  const float* cosines;
  const float* sines;
};

// One layer's weights and pages.
struct Layer {
  const void* attention_norm;     // [hidden]
  const void* qkv;                // [(query heads + 2 * KV heads) * head size, hidden]
  const void* query_norm;         // [head size], or null
  const void* key_norm;           // [head size], or null
  const void* out;                // [hidden, query heads * head size]
  const void* feed_forward_norm;  // [hidden]
  void* keys;
  void* values;
  const void* router;  // [experts, hidden], or null: a layer without experts
  Choice choice;       // without what a step decides
};

// The tokens of a step and where they lie.
struct Step {
  size_t tokens, sequences, max_pages;
  const int64_t* positions;
  const int32_t* query_lens;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const int64_t* page_ids;
  const int64_t* offsets;
  void* x;       // [tokens, hidden]: the residual
  void* normed;  // [tokens, hidden]: what the feed-forward gets
  int64_t* expert_ids;
  float* weights;
};

// One step at a time, from one thread.
class Decoder {
 public:
  Decoder(Isa isa, const Shape& shape);

  // Everything of a layer up to its feed-forward: step.x += add (the last layer's, or null), then
  // attention; step.normed, expert_ids and weights are what comes next.
  void run(const Layer& layer, const Step& step, const void* add, Workspace& workspace);

  // normed[r] = the norm of x[rows[r]] + add[rows[r]]
  struct Last {
    const void* norm;     // [hidden]
    const int64_t* rows;  // [count]
    size_t count;
    void* normed;  // [count, hidden]
  };
  void finish(const Last& last, const Step& step, const void* add) const;

 private:
  void norm(const Norm& call, size_t rows, Workspace& workspace) const;
  void attend(const Layer& layer, const Step& step, Workspace& workspace);
  void choose(const Layer& layer, const Step& step, Workspace& workspace);
  size_t element_bytes() const { return shape_.type == Type::kFloat32 ? 4 : 2; }

  const Isa isa_;
  const Shape shape_;
  Scratch scratch_;  // qkv, queries, outputs of attention and its product; or logits
};

}  // namespace kvc2::decoder
