// The product in plain lanes, in float32: a weight is broadcast to sixteen tokens. The reference
// for every instruction set, and the kernel of those without tiles.
#pragma once

#include <vector>

#include "experts/grouped.h"

namespace kvc2::experts {
namespace {

template <class T>
struct LanesProduct {
  using Element = T;

  // A panel is float[in][16].
  static size_t panel_bytes(size_t in) { return in * sizeof(Lanes); }

  static void pack(const T* const (&rows)[kLanes], size_t in, std::byte* panel) {
    for (size_t column = 0; column < in; column += kLanes) {
      const size_t count = std::min(kLanes, in - column);
      Lanes block[kLanes];
      for (size_t t = 0; t < kLanes; ++t) {
        block[t] = rows[t] == nullptr ? Lanes{} : load_some(rows[t] + column, count);
      }
      transpose(block);
      for (size_t i = 0; i < count; ++i) store(panel + (column + i) * sizeof(Lanes), block[i]);
    }
  }

  static void pack_output(std::byte* panel, size_t index, const Lanes (&outputs)[kLanes],
                          size_t count) {
    for (size_t i = 0; i < count; ++i) store(panel + (index + i) * sizeof(Lanes), outputs[i]);
  }

  class Multiplier {
   public:
    template <class Epilogue>
    void run(const WeightRows<T>& rows, size_t in, const Panels& panels, const Epilogue& epilogue) {
      widen_rows(rows.first, rows.first_count, in, first_);
      widen_rows(rows.second, rows.second_count, in, second_);
      Lanes low[kLanes], high[kLanes];
      for (size_t p = 0; p < panels.count; ++p) {
        multiply(first_, in, panels.at(p), low);
        multiply(second_, in, panels.at(p), high);
        epilogue(p, low, high);
      }
    }

   private:
    // Sixteen rows as floats, once for all panels; those beyond `count` are zero.
    static void widen_rows(const T* rows, size_t count, size_t in, std::vector<float>& wide) {
      wide.resize(kLanes * in);
      for (size_t i = 0; i < count * in; ++i) wide[i] = to_float(rows[i]);
      std::fill(wide.begin() + static_cast<ptrdiff_t>(count * in), wide.end(), 0.0f);
    }

    static void multiply(const std::vector<float>& rows, size_t in, const std::byte* panel,
                         Lanes (&outputs)[kLanes]) {
      constexpr size_t kRows = 8;  // sums that fit the registers of AVX-512 and half of AVX2's
      for (size_t row = 0; row < kLanes; row += kRows) {
        Lanes sums[kRows] = {};
        const float* w = rows.data() + row * in;
        for (size_t k = 0; k < in; ++k) {
          const Lanes x = load(panel + k * sizeof(Lanes));
#pragma GCC unroll 8
          for (size_t i = 0; i < kRows; ++i) sums[i] += w[i * in + k] * x;
        }
        for (size_t i = 0; i < kRows; ++i) outputs[row + i] = sums[i];
      }
    }

    std::vector<float> first_, second_;
  };
};

inline void lanes_linear(const Linear& call, Workspace& workspace) {
  call.type == Type::kFloat32 ? linear<LanesProduct<float>>(call, workspace)
                              : linear<LanesProduct<uint16_t>>(call, workspace);
}

inline void lanes_ffn(const Ffn& call, Workspace& workspace) {
  call.type == Type::kFloat32 ? ffn<LanesProduct<float>>(call, workspace)
                              : ffn<LanesProduct<uint16_t>>(call, workspace);
}

}  // namespace
}  // namespace kvc2::experts
