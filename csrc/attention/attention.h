// Attention over a paged pool. A page holds `page_size` tokens' K (or V) as [kv_heads, page_size,
// head_dim]; query heads [g * n, (g + 1) * n) share KV head g.
//
//   attend  each query sees its sequence's tokens up to its own position. Keys are taken in blocks
//           of kBlock from position 0 on, with a running maximum and sum (arXiv 2205.14135), so a
//           token's result has the same bits whatever the batch, the chunk or the threads.
//   write   puts new tokens' K and V into their pages.
//
// Not responsible for which pages a sequence has. Different instruction sets round differently.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cpu.h"
#include "base/workspace.h"

namespace kvc2::attention {

// Enough to make the rescaling between blocks cheap, few enough to stay in the first cache.
constexpr size_t kBlock = 128;

enum class Type { kFloat32, kBfloat16 };

// One layer's K or V of all pages.
struct Pages {
  size_t pages, kv_heads, page_size, head_dim;
};

struct Attend {
  Type type;  // of query, key, value and output
  Pages shape;
  size_t query_heads, sequences, max_pages;
  float scale;
  const void* query;            // [tokens, query_heads, head_dim], sequence after sequence
  const void* key;              // the pages of K
  const void* value;            // and of V
  const int32_t* query_lens;    // [sequences]
  const int32_t* context_lens;  // [sequences], with these queries: at least query_lens
  const int32_t* block_tables;  // [sequences, max_pages], each under `pages` where it is read
  void* output;                 // as query
};

struct Kernels {
  void (*attend)(const Attend&, Workspace&);
};

// The kernels for an instruction set, which the machine must have. amx does bfloat16 whose
// head_dim is a multiple of 32 in tiles, and leaves the rest to avx512.
Kernels kernels(Isa isa);

extern const Kernels kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAmxKernels;

struct Write {
  size_t element_bytes;
  Pages shape;
  size_t tokens;
  const void* key;          // [tokens, kv_heads, head_dim]
  const void* value;        // the same
  const int64_t* page_ids;  // [tokens], each under `pages`
  const int64_t* offsets;   // [tokens], each under page_size
  void* key_pages;
  void* value_pages;
};

void write(const Write& call);

}  // namespace kvc2::attention
