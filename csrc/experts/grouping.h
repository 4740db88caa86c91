// Which tokens each expert computes. Compiled for any machine: the kernels' own files hold no code
// of the standard library (see base/README.md).
#pragma once

#include <cstddef>
#include <vector>

#include "experts/experts.h"

namespace kvc2::experts {

// The (token, choice) slots in the order of their experts, cut into panels of one expert each;
// without those whose expert has a negative id.
class Grouping {
 public:
  // Up to `panel_tokens` places: positions in `slots`.
  struct Panel {
    size_t begin, count;
  };
  // An expert, up to so many of its tokens as are computed together, and where their places and
  // their panels begin.
  struct Share {
    size_t expert, begin, count, first_panel;
  };

  // `share_tokens`: a multiple of `panel_tokens`.
  Grouping(const Ffn& call, size_t panel_tokens, size_t share_tokens);
  ~Grouping();
  Grouping(const Grouping&) = delete;
  Grouping& operator=(const Grouping&) = delete;

  const size_t* slots;  // [num_slots], token * chosen + choice
  const Panel* panels;
  const Share* shares;
  size_t num_slots, num_panels, num_shares;

 private:
  std::vector<size_t> all_slots_;
  std::vector<Panel> all_panels_;
  std::vector<Share> all_shares_;
};

}  // namespace kvc2::experts
