#include "decoder/decoder.h"

#include <algorithm>
#include <cmath>

namespace kvc2::decoder {
namespace {

constexpr size_t kRowBytes = 64 * 1024;  // of rows that take as long as waking a thread

// Calls body(begin, end) for pieces of `rows` rows, each of so many bytes.
template <class Body>
void for_rows(ThreadTeam& team, size_t rows, size_t row_bytes, const Body& body) {
  team.parallel_for(rows, std::max<size_t>(1, kRowBytes / std::max<size_t>(1, row_bytes)), body);
}

experts::Weight plain(const void* weight) {
  return {static_cast<const std::byte*>(weight), 0, nullptr};
}

}  // namespace

const Kernels& kernels(Isa isa) {
  return chosen(isa, kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Kernels);
}

Decoder::Decoder(Isa isa, const Shape& shape) : isa_(isa), shape_(shape) {}

void Decoder::run(const Layer& layer, const Step& step, const void* add, Workspace& workspace) {
  const Norm before{shape_.type,          shape_.hidden, shape_.eps, add,
                    layer.attention_norm, step.x,        step.normed};
  norm(before, step.tokens, workspace);
  attend(layer, step, workspace);
  choose(layer, step, workspace);
}

void Decoder::attend(const Layer& layer, const Step& step, Workspace& workspace) {
  const size_t heads = shape_.query_heads + 2 * shape_.kv_heads, size = shape_.head_size;
  const size_t qkv_bytes = step.tokens * heads * size * element_bytes();
  const size_t query_bytes = step.tokens * shape_.query_heads * size * element_bytes();
  const size_t out_bytes = step.tokens * shape_.hidden * element_bytes();
  auto* qkv =
      static_cast<std::byte*>(scratch_.reserve(std::max(qkv_bytes, out_bytes) + 2 * query_bytes));
  std::byte* query = qkv + std::max(qkv_bytes, out_bytes);
  std::byte* mixed = query + query_bytes;
  void* out = qkv;  // which nobody needs by then

  const auto linear = experts::kernels(isa_).linear;
  linear(
      {shape_.type, step.tokens, shape_.hidden, heads * size, step.normed, plain(layer.qkv), qkv},
      workspace);
  const attention::Pages pages{shape_.pages, shape_.kv_heads, shape_.page_size, size, size};
  const Place place{shape_.type,    shape_.query_heads, pages,
                    shape_.eps,     layer.query_norm,   layer.key_norm,
                    shape_.cosines, shape_.sines,       step.positions,
                    step.page_ids,  step.offsets,       qkv,
                    query,          layer.keys,         layer.values};
  for_rows(workspace.team, step.tokens, qkv_bytes / step.tokens,
           [&](size_t begin, size_t end) { kernels(isa_).place(place, begin, end); });
  attention::Attend call{};
  call.type =
      shape_.type == Type::kFloat32 ? attention::Type::kFloat32 : attention::Type::kBfloat16;
  call.keys = call.values = pages;
  call.scores.scale = 1.0f / std::sqrt(static_cast<float>(size));
  call.query_heads = shape_.query_heads;
  call.sequences = step.sequences, call.max_pages = step.max_pages;
  call.query = query, call.key = layer.keys, call.value = layer.values;
  call.query_lens = step.query_lens, call.context_lens = step.context_lens;
  call.block_tables = step.block_tables, call.output = mixed;
  attention::kernels(isa_).attend(call, workspace);
  linear({shape_.type, step.tokens, shape_.query_heads * size, shape_.hidden, mixed,
          plain(layer.out), out},
         workspace);
  const Norm after{shape_.type, shape_.hidden, shape_.eps, out, layer.feed_forward_norm,
                   step.x,      step.normed};
  norm(after, step.tokens, workspace);
}

void Decoder::choose(const Layer& layer, const Step& step, Workspace& workspace) {
  if (layer.router == nullptr) return;
  Choice choice = layer.choice;
  const size_t row_bytes = choice.experts * element_bytes();
  void* logits = scratch_.reserve(step.tokens * row_bytes);
  experts::kernels(isa_).linear({shape_.type, step.tokens, shape_.hidden, choice.experts,
                                 step.normed, plain(layer.router), logits},
                                workspace);
  choice.logits = logits, choice.expert_ids = step.expert_ids, choice.weights = step.weights;
  for_rows(workspace.team, step.tokens, 16 * row_bytes,
           [&](size_t begin, size_t end) { kernels(isa_).choose(choice, begin, end); });
}

void Decoder::finish(const Last& last, const Step& step, const void* add) const {
  const size_t row_bytes = shape_.hidden * element_bytes();
  for (size_t i = 0; i < last.count; ++i) {
    const auto row = static_cast<size_t>(last.rows[i]) * row_bytes;
    const auto at = [&](const void* from) {
      return from == nullptr ? nullptr : static_cast<const std::byte*>(from) + row;
    };
    kernels(isa_).norm({shape_.type, shape_.hidden, shape_.eps, at(add), last.norm,
                        static_cast<std::byte*>(step.x) + row,
                        static_cast<std::byte*>(last.normed) + i * row_bytes},
                       0, 1);
  }
}

void Decoder::norm(const Norm& call, size_t rows, Workspace& workspace) const {
  for_rows(workspace.team, rows, 3 * call.size * element_bytes(),
           [&](size_t begin, size_t end) { kernels(isa_).norm(call, begin, end); });
}

}  // namespace kvc2::decoder
