#include "attention/attention.h"

#include <cstring>

namespace kvc2::attention {

Kernels kernels(Isa isa) {
  return chosen(isa, kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAmxKernels);
}

void write(const Write& call) {
  const size_t row = call.shape.head_dim * call.element_bytes;
  const auto copy = [&](const void* from, void* pages, size_t token, size_t head) {
    const size_t page = static_cast<size_t>(call.page_ids[token]) * call.shape.kv_heads + head;
    const size_t slot = page * call.shape.page_size + static_cast<size_t>(call.offsets[token]);
    std::memcpy(static_cast<std::byte*>(pages) + slot * row,
                static_cast<const std::byte*>(from) + (token * call.shape.kv_heads + head) * row,
                row);
  };
  for (size_t token = 0; token < call.tokens; ++token) {
    for (size_t head = 0; head < call.shape.kv_heads; ++head) {
      copy(call.key, call.key_pages, token, head);
      copy(call.value, call.value_pages, token, head);
    }
  }
}

}  // namespace kvc2::attention
