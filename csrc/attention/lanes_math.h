// The sums in plain lanes, in float32: a key's or a value's element is broadcast to sixteen rows.
// The reference for every instruction set, and the kernel of those without tiles.
#pragma once

#include <vector>

#include "attention/flash.h"

namespace kvc2::attention {
namespace {

template <class T>
struct LanesMath {
  using Element = T;

  // A panel is float[dim][16].
  static size_t panel_bytes(size_t dim) { return dim * sizeof(Lanes); }

  static void pack(const T* const (&rows)[kLanes], size_t dim, std::byte* panel) {
    for (size_t d = 0; d < dim; d += kLanes) {
      const size_t count = std::min(kLanes, dim - d);
      Lanes block[kLanes];
      for (size_t i = 0; i < kLanes; ++i) {
        block[i] = rows[i] == nullptr ? Lanes{} : load_some(rows[i] + d, count);
      }
      transpose(block);
      for (size_t i = 0; i < count; ++i) store(panel + (d + i) * sizeof(Lanes), block[i]);
    }
  }

  class Block {
   public:
    // Padded to whole steps, so that the loops below need no ends.
    explicit Block(size_t dim)
        : dim_(dim),
          stride_((dim + kStep - 1) / kStep * kStep),
          keys_(kBlock * stride_),
          values_(kBlock * stride_) {}

    void load(const T* const* keys, const T* const* values, size_t count) {
      count_ = (count + kStep - 1) / kStep * kStep;
      for (size_t j = 0; j < count_; ++j) {
        for (size_t d = 0; d < dim_; ++d) {
          keys_[j * stride_ + d] = j < count ? to_float(keys[j][d]) : 0.0f;
          values_[j * stride_ + d] = j < count ? to_float(values[j][d]) : 0.0f;
        }
      }
    }

    void score(const std::byte* panel, Lanes* scores) const {
      for (size_t j = 0; j < count_; j += kStep) {
        Lanes sums[kStep] = {};
        const float* keys = keys_.data() + j * stride_;
        for (size_t d = 0; d < dim_; ++d) {
          const Lanes query = kvc2::load(panel + d * sizeof(Lanes));
#pragma GCC unroll 8
          for (size_t i = 0; i < kStep; ++i) sums[i] += keys[i * stride_ + d] * query;
        }
        for (size_t i = 0; i < kStep; ++i) scores[j + i] = sums[i];
      }
    }

    void mix(const Lanes* weights, Lanes* sums) const {
      for (size_t d = 0; d < dim_; d += kStep) {
        const size_t count = std::min(kStep, dim_ - d);
        Lanes parts[kStep] = {};
        for (size_t j = 0; j < count_; ++j) {
          const float* value = values_.data() + j * stride_ + d;
#pragma GCC unroll 8
          for (size_t i = 0; i < kStep; ++i) parts[i] += value[i] * weights[j];
        }
        for (size_t i = 0; i < count; ++i) sums[d + i] += parts[i];
      }
    }

   private:
    static constexpr size_t kStep = 8;  // sums that fit the registers
    const size_t dim_, stride_;
    std::vector<float> keys_, values_;  // [kBlock][stride_]
    size_t count_ = 0;
  };
};

inline void lanes_attend(const Attend& call, Workspace& workspace) {
  call.type == Type::kFloat32 ? attend<LanesMath<float>>(call, workspace)
                              : attend<LanesMath<uint16_t>>(call, workspace);
}

}  // namespace
}  // namespace kvc2::attention
