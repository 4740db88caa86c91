// Attention over a paged pool. A page holds `page_size` tokens' keys (or values) as [kv_heads,
// page_size, size]; query heads [g * n, (g + 1) * n) share KV head g.
//
//   attend  each query sees its sequence's tokens up to its own position, or the last `window` of
//           them. Keys are taken in pieces of kPiece from position 0 on; each piece has a softmax
//           of its own, and the pieces are merged in order (arXiv 2205.14135). So a token's result
//           has the same bits whatever the batch, the chunk or the threads.
//   write   puts new tokens' keys and values into their pages.
//
// Not responsible for which pages a sequence has. Different instruction sets round differently.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cpu.h"
#include "base/workspace.h"

namespace kvc2::attention {

// Part of the bits. Few enough that one long context feeds many threads, enough to make the merges
// cheap beside the sums.
constexpr size_t kPiece = 256;

enum class Type { kFloat32, kBfloat16 };

// One layer's keys or values of all pages.
struct Pages {
  size_t pages, kv_heads, page_size;
  size_t size;    // elements of a key, or of a value
  size_t stride;  // elements from one to the next: more than `size` where values lie inside keys
};

// How scores are made of products; all of it may be left out.
struct Scores {
  float scale;
  float soft_cap;      // c > 0: c * tanh(score / c) in the place of each score (arXiv 2408.00118)
  size_t window;       // w > 0: a query sees itself and the w - 1 tokens before
  const float* sinks;  // [query_heads], or null: a logit that takes weight and gives no value
};

struct Attend {
  Type type;           // of query, key, value and output
  Pages keys, values;  // that differ in size and stride at most
  Scores scores;
  size_t query_heads, sequences, max_pages;
  const void* query;            // [tokens, query_heads, keys.size], sequence after sequence
  const void* key;              // the pages of keys
  const void* value;            // and of values
  const int32_t* query_lens;    // [sequences]
  const int32_t* context_lens;  // [sequences], with these queries: at least query_lens
  const int32_t* block_tables;  // [sequences, max_pages], each under `pages` where it is read
  void* output;                 // [tokens, query_heads, values.size]
};

struct Kernels {
  void (*attend)(const Attend&, Workspace&);
};

// The kernels for an instruction set, which the machine must have. What one has nothing of its own
// for (float32 in pairs or tiles of bfloat16) it leaves to the one below.
Kernels kernels(Isa isa);

extern const Kernels kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels,
    kAmxKernels;

struct Write {
  size_t element_bytes;
  Pages keys, values;
  size_t tokens;
  const void* key;          // [tokens, kv_heads, keys.size]
  const void* value;        // [tokens, kv_heads, values.size]
  const int64_t* page_ids;  // [tokens], each under `pages`
  const int64_t* offsets;   // [tokens], each under page_size
  void* key_pages;
  void* value_pages;
};

void write(const Write& call);

}  // namespace kvc2::attention
