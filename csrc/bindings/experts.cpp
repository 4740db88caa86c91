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

// The call without its sum: x, the choices of its tokens, the weights of its experts.
experts::Ffn choices(const py::array& x, const ArrayOf<int64_t>& expert_ids,
                     const ExpertWeights& expert, int64_t least_id) {
  experts::Ffn call{};
  call.type = type_of(x);
  check_array(x, "x", x.dtype(), {-1, -1});
  const auto tokens = x.shape(0), hidden = x.shape(1);
  check_array(expert.down, "down", x.dtype(), {-1, hidden, -1});
  const auto count = expert.down.shape(0), width = expert.down.shape(2);
  check_array(expert.gate_up, "gate_up", x.dtype(), {count, 2 * width, hidden});
  check_array(expert_ids, "expert_ids", expert_ids.dtype(), {tokens, -1});
  for (py::ssize_t i = 0; i < expert_ids.size(); ++i) {
    if (expert_ids.data()[i] < least_id || expert_ids.data()[i] >= count) {
      throw py::value_error("expert_ids must be under the number of experts");
    }
  }
  call.tokens = size(tokens), call.hidden = size(hidden), call.size = size(width);
  call.experts = size(count), call.chosen = size(expert_ids.shape(1));
  call.x = x.data(), call.expert_ids = expert_ids.data();
  call.gate_up = expert.gate_up.data(), call.down = expert.down.data();
  return call;
}

void run(Workbench& workbench, const experts::Ffn& call) {
  const py::gil_scoped_release released;
  const std::lock_guard lock(workbench.mutex);
  experts::kernels(workbench.isa).ffn(call, workbench.workspace);
}

void ffn(Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
         const ArrayOf<float>& weights, const ExpertWeights& expert, py::array& y) {
  experts::Ffn call = choices(x, expert_ids, expert, 0);
  check_array(weights, "weights", weights.dtype(), {x.shape(0), expert_ids.shape(1)});
  check_array(y, "y", x.dtype(), {x.shape(0), x.shape(1)});
  call.weights = weights.data(), call.y = y.mutable_data();
  run(workbench, call);
}

void ffn_choices(Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
                 const ExpertWeights& expert, ArrayOf<float>& outputs) {
  experts::Ffn call = choices(x, expert_ids, expert, -1);
  check_array(outputs, "outputs", outputs.dtype(), {x.shape(0), expert_ids.shape(1), x.shape(1)});
  call.outputs = outputs.mutable_data();
  run(workbench, call);
}

void sum_choices(Workbench& workbench, ArrayOf<float>& outputs, const ArrayOf<float>& weights,
                 py::array& y) {
  experts::Ffn call{};
  call.type = type_of(y);
  check_array(outputs, "outputs", outputs.dtype(), {-1, -1, -1});
  check_array(weights, "weights", weights.dtype(), {outputs.shape(0), outputs.shape(1)});
  check_array(y, "y", y.dtype(), {outputs.shape(0), outputs.shape(2)});
  call.tokens = size(outputs.shape(0)), call.chosen = size(outputs.shape(1));
  call.hidden = size(outputs.shape(2)), call.outputs = outputs.mutable_data();
  call.weights = weights.data(), call.y = y.mutable_data();
  run(workbench, call);
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
  // Written to in place: a conversion would be written to, and lost.
  module.def(
      "ffn_choices",
      [](Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
         const py::array& gate_up, const py::array& down, ArrayOf<float>& outputs) {
        ffn_choices(workbench, x, expert_ids, {gate_up, down}, outputs);
      },
      py::arg("workbench"), py::arg("x"), py::arg("expert_ids"), py::arg("gate_up"),
      py::arg("down"), py::arg("outputs").noconvert());
  module.def("sum_choices", &sum_choices, py::arg("workbench"), py::arg("outputs").noconvert(),
             py::arg("weights"), py::arg("y"));
}
