// Products of token rows with weights: one weight for all tokens (linear), or the gated FFN of each
// token's experts (ffn). Weights are as checkpoints store them ([out, in], never repacked), or
// quantised (packed.h).
//
// A result depends on its own token only: every sum runs over `in` in one fixed order, whatever
// the number of tokens or threads. Different instruction sets sum in different orders.
// Not responsible for routing, nor for where a weight lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "base/cpu.h"
#include "base/workspace.h"
#include "experts/packed.h"

namespace kvc2::experts {

enum class Type { kFloat32, kBfloat16 };

// Of plain weights [n, out, in] of the call's type, or of packed ones n records. gate_up has gate
// and up one after the other: as rows [2 * size], or as two parts of a record.
struct Weight {
  const std::byte* data;
  size_t record_bytes;     // 0: plain
  const PackedHead* head;  // of all records that the call reads; null: plain
};

// y[t] = w x[t]
struct Linear {
  Type type;  // of x, y and plain w
  size_t tokens, in, out;
  const void* x;  // [tokens, in]
  Weight w;       // one [out, in]
  void* y;        // [tokens, out]
};

// What becomes of an expert's gate and up, each without more than `limit` (of up: in size):
//   kSilu      gate * sigmoid(alpha * gate) * (up + offset)
//   kGeluTanh  gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 gate^3))) / 2 * (up + offset)
enum class Activation { kSilu, kGeluTanh };
struct Gating {
  Activation activation = Activation::kSilu;
  float alpha = 1.0f;
  float limit = std::numeric_limits<float>::infinity();
  float offset = 0.0f;
};

// y[t] = sum over j of weights[t, j] * down_e (gating(gate_e x[t], up_e x[t])),
// e = expert_ids[t, j]
//
// A call may be half of that, so that several can share the choices of one sum, and give its bits:
// without weights and y it computes `outputs` alone, and none for a choice whose id is negative;
// without x, expert_ids, gate_up and down it sums given outputs.
struct Ffn {
  Type type;  // of x, y and plain weights
  size_t tokens, hidden, size, experts, chosen;
  const void* x;              // [tokens, hidden]
  const int64_t* expert_ids;  // [tokens, chosen], each under `experts`
  const float* weights;       // [tokens, chosen]
  Weight gate_up;             // [experts, 2 * size, hidden], gate first
  Weight down;                // [experts, hidden, size]
  void* y;                    // [tokens, hidden]
  float* outputs;             // [tokens, chosen, hidden], each choice unweighed; null: not wanted
  Gating gating;
  const float* gate_up_bias;  // [experts, 2 * size], or null
  const float* down_bias;     // [experts, hidden], or null
};

struct Kernels {
  void (*linear)(const Linear&, Workspace&);
  void (*ffn)(const Ffn&, Workspace&);
};

// The kernels for an instruction set, which the machine must have; of plain weights, or of packed
// ones, where gate_up and down may differ in all but that. Tiles add one product after the
// other and can't give the bits of lanes: amx does bfloat16 whose sizes are multiples of 32
// (outputs: 16) in tiles, and fp8, for one token as for many, integers for many, and leaves the
// rest to avx512_bf16.
Kernels kernels(Isa isa, bool packed = false);

extern const Kernels kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels,
    kAmxKernels;
extern const Kernels kPortablePacked, kAvx2Packed, kAvx512Packed, kAvx512VnniPacked,
    kAvx512Bf16Packed, kAmxPacked;

}  // namespace kvc2::experts
