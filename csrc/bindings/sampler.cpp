// engine._kernels: the next token of each row of logits. A wrong dtype, shape or number is a
// ValueError that names the argument.
#include "decoder/sampler.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings/kernels.h"

namespace py = pybind11;
namespace kvc2 {
namespace {

// [rows, 4]: temperature, top_k, top_p, min_p; [rows, 2]: seed, position.
std::vector<decoder::Sampling> samplings(const ArrayOf<double>& filters,
                                         const ArrayOf<uint64_t>& streams) {
  std::vector<decoder::Sampling> made(size(filters.shape(0)));
  const double* filter = filters.data();
  const uint64_t* stream = streams.data();
  for (auto& how : made) {
    const double temperature = filter[0], top_k = filter[1], top_p = filter[2], min_p = filter[3];
    const bool right = temperature >= 0 && std::isfinite(temperature) && top_k >= 0 &&
                       std::isfinite(top_k) && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
    if (!right) throw py::value_error("filters holds a number that is out of its range");
    const double colder = temperature > 0 ? decoder::kColdest : 0;
    how = {static_cast<float>(std::clamp(temperature, colder, decoder::kHottest)),
           static_cast<size_t>(std::min(top_k, 1e15)),
           top_p,
           static_cast<float>(min_p),
           stream[0],
           stream[1]};
    filter += 4, stream += 2;
  }
  return made;
}

void sample(Workbench& workbench, const ArrayOf<float>& logits, const ArrayOf<int64_t>& row_ids,
            const ArrayOf<double>& filters, const ArrayOf<uint64_t>& streams,
            ArrayOf<int64_t>& tokens) {
  check_array(logits, "logits", logits.dtype(), {-1, -1});
  check_array(row_ids, "row_ids", row_ids.dtype(), {-1});
  const auto rows = row_ids.shape(0);
  check_array(filters, "filters", filters.dtype(), {rows, 4});
  check_array(streams, "streams", streams.dtype(), {rows, 2});
  check_array(tokens, "tokens", tokens.dtype(), {rows});
  const auto vocabulary = logits.shape(1);
  if (vocabulary < 1 || vocabulary > decoder::kMostTokens) {
    throw py::value_error("logits must be of 1 to 2**24 tokens");
  }
  for (py::ssize_t r = 0; r < rows; ++r) {
    const int64_t row = row_ids.at(r);
    if (row < 0 || row >= logits.shape(0)) throw py::value_error("row_ids must be of logits");
  }
  const auto how = samplings(filters, streams);
  const decoder::Sample call{size(rows),     size(vocabulary), logits.data(),
                             row_ids.data(), how.data(),       tokens.mutable_data()};
  const py::gil_scoped_release released;
  const std::lock_guard lock(workbench.mutex);
  decoder::sample(call, workbench.workspace);
}

}  // namespace
}  // namespace kvc2

void bind_sampler(py::module_& module) {
  module.attr("NO_TOKEN") = kvc2::decoder::kNoToken;
  module.def("sample", &kvc2::sample, py::arg("workbench"), py::arg("logits").noconvert(),
             py::arg("row_ids").noconvert(), py::arg("filters").noconvert(),
             py::arg("streams").noconvert(), py::arg("tokens").noconvert());
}
