#include "attention/attention.h"

#include <cstring>

namespace kvc2::attention {

Kernels kernels(Isa isa) {
  if (isa == Isa::kAvx512Bf16) return kAvx512Bf16Kernels;
  return chosen(isa, kPortableKernels, kAvx2Kernels, kAvx512Kernels, kAmxKernels);
}

void write(const Write& call) {
  const auto copy = [&](const Pages& pages, const void* from, void* to, size_t token) {
    const size_t row = pages.size * call.element_bytes, stride = pages.stride * call.element_bytes;
    const auto page = static_cast<size_t>(call.page_ids[token]);
    const auto offset = static_cast<size_t>(call.offsets[token]);
    for (size_t head = 0; head < pages.kv_heads; ++head) {
      const size_t slot = (page * pages.kv_heads + head) * pages.page_size + offset;
      std::memcpy(static_cast<std::byte*>(to) + slot * stride,
                  static_cast<const std::byte*>(from) + (token * pages.kv_heads + head) * row, row);
    }
  };
  for (size_t token = 0; token < call.tokens; ++token) {
    copy(call.keys, call.key, call.key_pages, token);
    copy(call.values, call.value, call.value_pages, token);
  }
}

}  // namespace kvc2::attention
