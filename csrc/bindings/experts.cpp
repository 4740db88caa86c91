// engine._kernels: products with weights. Arrays are numpy's: float32, or uint16 that holds
// bfloat16. A wrong dtype or shape is a ValueError that names the argument.
#include "experts/experts.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bindings/kernels.h"

namespace py = pybind11;
namespace kvc2 {
namespace {

experts::Type type_of(const py::array& x) {
  if (x.dtype().kind() == 'f' && x.itemsize() == 4) return experts::Type::kFloat32;
  if (x.dtype().kind() == 'u' && x.itemsize() == 2) return experts::Type::kBfloat16;
  throw py::value_error("x must be float32, or uint16 that holds bfloat16");
}

void linear(Workbench& workbench, const py::array& x, const py::array& w, py::array& y) {
  const experts::Type type = type_of(x);
  check_array(x, "x", x.dtype(), {-1, -1});
  const auto tokens = x.shape(0), in = x.shape(1);
  check_array(w, "w", x.dtype(), {-1, in});
  check_array(y, "y", x.dtype(), {tokens, w.shape(0)});
  const experts::Linear call{type,     size(tokens), size(in),        size(w.shape(0)),
                             x.data(), w.data(),     y.mutable_data()};
  const py::gil_scoped_release released;
  const std::lock_guard lock(workbench.mutex);
  experts::kernels(workbench.isa).linear(call, workbench.workspace);
}

struct ExpertWeights {
  const py::array& gate_up;
  const py::array& down;
};

void ffn(Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
         const ArrayOf<float>& weights, const ExpertWeights& expert, py::array& y) {
  const experts::Type type = type_of(x);
  check_array(x, "x", x.dtype(), {-1, -1});
  const auto tokens = x.shape(0), hidden = x.shape(1);
  check_array(expert.down, "down", x.dtype(), {-1, hidden, -1});
  const auto count = expert.down.shape(0), width = expert.down.shape(2);
  check_array(expert.gate_up, "gate_up", x.dtype(), {count, 2 * width, hidden});
  check_array(expert_ids, "expert_ids", expert_ids.dtype(), {tokens, -1});
  check_array(weights, "weights", weights.dtype(), {tokens, expert_ids.shape(1)});
  check_array(y, "y", x.dtype(), {tokens, hidden});
  for (py::ssize_t i = 0; i < expert_ids.size(); ++i) {
    if (expert_ids.data()[i] < 0 || expert_ids.data()[i] >= count) {
      throw py::value_error("expert_ids must be under the number of experts");
    }
  }
  const experts::Ffn call{type,
                          size(tokens),
                          size(hidden),
                          size(width),
                          size(count),
                          size(expert_ids.shape(1)),
                          x.data(),
                          expert_ids.data(),
                          weights.data(),
                          expert.gate_up.data(),
                          expert.down.data(),
                          y.mutable_data()};
  const py::gil_scoped_release released;
  const std::lock_guard lock(workbench.mutex);
  experts::kernels(workbench.isa).ffn(call, workbench.workspace);
}

}  // namespace
}  // namespace kvc2

void bind_experts(pybind11::module_& module) {
  using namespace kvc2;
  module.def("linear", &linear);
  module.def("ffn",
             [](Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
                const ArrayOf<float>& weights, const py::array& gate_up, const py::array& down,
                py::array& y) { ffn(workbench, x, expert_ids, weights, {gate_up, down}, y); });
}
