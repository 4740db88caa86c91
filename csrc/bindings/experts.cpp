// engine._kernels: products with weights. Arrays are numpy's: float32, or uint16 that holds
// bfloat16; weights also uint8 that holds records (experts/packed.h). A wrong dtype, shape or
// record is a ValueError that names the argument.
#include "experts/experts.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>

#include "bindings/kernels.h"

namespace py = pybind11;
namespace kvc2 {
namespace {

experts::Type type_of(const py::array& x) {
  if (x.dtype().kind() == 'f' && x.itemsize() == 4) return experts::Type::kFloat32;
  if (x.dtype().kind() == 'u' && x.itemsize() == 2) return experts::Type::kBfloat16;
  throw py::value_error("x must be float32, or uint16 that holds bfloat16");
}

bool is_packed(const py::array& w) { return w.dtype().kind() == 'u' && w.itemsize() == 1; }

const std::byte* bytes_of(const py::array& w) { return static_cast<const std::byte*>(w.data()); }

experts::Weight plain(const py::array& w) { return {bytes_of(w), 0, nullptr}; }

// Records of the same kind, as far as they are read.
class Records {
 public:
  // [n, bytes of one].
  Records(const py::array& w, const char* name) : name_(name), data_(bytes_of(w)) {
    check_array(w, name, w.dtype(), {-1, -1});
    bytes_ = size(w.shape(1));
    if (bytes_ < sizeof(experts::PackedHead)) refuse("is too short for a record");
  }

  // This one will be read. Raises unless it is a record like the others so far.
  void use(size_t index) {
    const std::byte* record = data_ + index * bytes_;
    if (used_) {
      if (std::memcmp(&head_, record, sizeof head_) != 0) refuse("has records that differ");
      return;
    }
    std::memcpy(&head_, record, sizeof head_);
    if (!head_.valid() || head_.bytes() != bytes_) refuse("is no record of a quantised weight");
    used_ = true;
  }

  // Raises unless it has this shape. After `use`.
  void check(size_t parts, size_t rows, size_t in) const {
    if (head_.parts != parts || head_.rows != rows || head_.in != in) refuse("has a wrong shape");
  }

  bool used() const { return used_; }
  const experts::PackedHead& head() const { return head_; }
  experts::Weight weight() const { return {data_, bytes_, &head_}; }

 private:
  [[noreturn]] void refuse(const char* why) const {
    throw py::value_error(std::string(name_) + " " + why);
  }

  const char* name_;
  const std::byte* data_;
  size_t bytes_ = 0;
  bool used_ = false;
  experts::PackedHead head_{};
};

void run(Workbench& workbench, const experts::Linear& call) {
  const py::gil_scoped_release released;
  const std::lock_guard lock(workbench.mutex);
  experts::kernels(workbench.isa, call.w.head != nullptr).linear(call, workbench.workspace);
}

void linear(Workbench& workbench, const py::array& x, const py::array& w, py::array& y) {
  experts::Linear call{};
  call.type = type_of(x);
  check_array(x, "x", x.dtype(), {-1, -1});
  check_array(y, "y", x.dtype(), {x.shape(0), -1});
  call.tokens = size(x.shape(0)), call.in = size(x.shape(1)), call.out = size(y.shape(1));
  call.x = x.data(), call.y = y.mutable_data();
  if (is_packed(w)) {
    Records records(w, "w");
    check_array(w, "w", w.dtype(), {1, -1});
    records.use(0);
    records.check(1, call.out, call.in);
    call.w = records.weight();
    return run(workbench, call);
  }
  check_array(w, "w", x.dtype(), {y.shape(1), x.shape(1)});
  call.w = plain(w);
  run(workbench, call);
}

using Floats = std::optional<ArrayOf<float>>;

// What experts make of gate and up; keeps the arrays that it reads.
struct Gating {
  experts::Gating how;
  Floats gate_up_bias, down_bias;
};

Gating make_gating(const std::string& activation, float alpha, const std::optional<float>& limit,
                   float offset) {
  Gating made;
  if (activation != "silu" && activation != "gelu_tanh") {
    throw py::value_error("activation may be silu or gelu_tanh, not '" + activation + "'");
  }
  made.how.activation =
      activation == "silu" ? experts::Activation::kSilu : experts::Activation::kGeluTanh;
  if (limit && !(*limit > 0)) throw py::value_error("limit must be over 0");
  made.how.alpha = alpha, made.how.limit = limit.value_or(made.how.limit);
  made.how.offset = offset;
  return made;
}

struct ExpertWeights {
  const py::array& gate_up;
  const py::array& down;
  const Gating& gating;
};

void take_gating(experts::Ffn& call, const Gating& gating) {
  const auto of = [](size_t n) { return static_cast<py::ssize_t>(n); };
  call.gating = gating.how;
  if (gating.gate_up_bias) {
    check_array(*gating.gate_up_bias, "gate_up_bias", gating.gate_up_bias->dtype(),
                {of(call.experts), of(2 * call.size)});
    call.gate_up_bias = gating.gate_up_bias->data();
  }
  if (gating.down_bias) {
    check_array(*gating.down_bias, "down_bias", gating.down_bias->dtype(),
                {of(call.experts), of(call.hidden)});
    call.down_bias = gating.down_bias->data();
  }
}

void run(Workbench& workbench, const experts::Ffn& call) {
  const py::gil_scoped_release released;
  const std::lock_guard lock(workbench.mutex);
  experts::kernels(workbench.isa, call.down.head != nullptr).ffn(call, workbench.workspace);
}

// The call without its sum: x and the choices of its tokens.
experts::Ffn choices(const py::array& x, const ArrayOf<int64_t>& expert_ids,
                     const ExpertWeights& expert, int64_t least_id) {
  experts::Ffn call{};
  call.type = type_of(x);
  check_array(x, "x", x.dtype(), {-1, -1});
  check_array(expert_ids, "expert_ids", expert_ids.dtype(), {x.shape(0), -1});
  if (expert.down.ndim() < 1) throw py::value_error("down has a wrong shape");
  const auto count = expert.down.shape(0);
  for (py::ssize_t i = 0; i < expert_ids.size(); ++i) {
    if (expert_ids.data()[i] < least_id || expert_ids.data()[i] >= count) {
      throw py::value_error("expert_ids must be under the number of experts");
    }
  }
  call.tokens = size(x.shape(0)), call.hidden = size(x.shape(1));
  call.experts = size(count), call.chosen = size(expert_ids.shape(1));
  call.x = x.data(), call.expert_ids = expert_ids.data();
  return call;
}

// Runs a call of `choices` with its weights. Of records only those of the chosen are looked at.
void run(Workbench& workbench, experts::Ffn& call, const ExpertWeights& expert,
         const py::array& x) {
  const auto count = static_cast<py::ssize_t>(call.experts);
  if (!is_packed(expert.down)) {
    check_array(expert.down, "down", x.dtype(), {count, x.shape(1), -1});
    const auto width = expert.down.shape(2);
    check_array(expert.gate_up, "gate_up", x.dtype(), {count, 2 * width, x.shape(1)});
    call.size = size(width);
    call.gate_up = plain(expert.gate_up), call.down = plain(expert.down);
    take_gating(call, expert.gating);
    return run(workbench, call);
  }
  check_array(expert.gate_up, "gate_up", expert.down.dtype(), {count, -1});
  Records gate_up(expert.gate_up, "gate_up"), down(expert.down, "down");
  for (size_t i = 0; i < call.tokens * call.chosen; ++i) {
    if (call.expert_ids[i] < 0) continue;
    gate_up.use(static_cast<size_t>(call.expert_ids[i]));
    down.use(static_cast<size_t>(call.expert_ids[i]));
  }
  if (!down.used()) return;  // nothing to compute
  call.size = down.head().in;
  gate_up.check(2, call.size, call.hidden);
  down.check(1, call.hidden, call.size);
  call.gate_up = gate_up.weight(), call.down = down.weight();
  take_gating(call, expert.gating);
  run(workbench, call);
}

void ffn(Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
         const ArrayOf<float>& weights, const ExpertWeights& expert, py::array& y) {
  experts::Ffn call = choices(x, expert_ids, expert, 0);
  check_array(weights, "weights", weights.dtype(), {x.shape(0), expert_ids.shape(1)});
  check_array(y, "y", x.dtype(), {x.shape(0), x.shape(1)});
  if (call.chosen == 0) throw py::value_error("expert_ids has a wrong shape");
  call.weights = weights.data(), call.y = y.mutable_data();
  run(workbench, call, expert, x);
}

void ffn_choices(Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
                 const ExpertWeights& expert, ArrayOf<float>& outputs) {
  experts::Ffn call = choices(x, expert_ids, expert, -1);
  check_array(outputs, "outputs", outputs.dtype(), {x.shape(0), expert_ids.shape(1), x.shape(1)});
  call.outputs = outputs.mutable_data();
  run(workbench, call, expert, x);
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

// One more in counts [experts] for each id of an array of any shape; nothing where one is wrong.
void count_choices(const ArrayOf<int64_t>& expert_ids, ArrayOf<double>& counts) {
  check_array(counts, "counts", counts.dtype(), {-1});
  const int64_t* ids = expert_ids.data();
  for (py::ssize_t i = 0; i < expert_ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= counts.size()) {
      throw py::value_error("expert_ids must be under the number of experts, not " +
                            std::to_string(ids[i]));
    }
  }
  double* const found = counts.mutable_data();
  for (py::ssize_t i = 0; i < expert_ids.size(); ++i) found[ids[i]] += 1;
}

}  // namespace
}  // namespace kvc2

void bind_experts(pybind11::module_& module) {
  using namespace kvc2;
  py::class_<Gating>(module, "Gating")
      .def(
          py::init([](const std::string& activation, float alpha, const std::optional<float>& limit,
                      float offset, const Floats& gate_up_bias, const Floats& down_bias) {
            Gating made = make_gating(activation, alpha, limit, offset);
            made.gate_up_bias = gate_up_bias, made.down_bias = down_bias;
            return made;
          }),
          py::kw_only(), py::arg("activation") = "silu", py::arg("alpha") = 1.0f,
          py::arg("limit") = py::none(), py::arg("offset") = 0.0f,
          py::arg("gate_up_bias") = py::none(), py::arg("down_bias") = py::none());
  module.def("linear", &linear);
  module.def(
      "ffn",
      [](Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
         const ArrayOf<float>& weights, const py::array& gate_up, const py::array& down,
         py::array& y, const Gating& gating) {
        ffn(workbench, x, expert_ids, weights, {gate_up, down, gating}, y);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::pos_only(),
      py::kw_only(), py::arg("gating") = Gating{});
  // Written to in place: a conversion would be written to, and lost.
  module.def(
      "ffn_choices",
      [](Workbench& workbench, const py::array& x, const ArrayOf<int64_t>& expert_ids,
         const py::array& gate_up, const py::array& down, ArrayOf<float>& outputs,
         const Gating& gating) {
        ffn_choices(workbench, x, expert_ids, {gate_up, down, gating}, outputs);
      },
      py::arg("workbench"), py::arg("x"), py::arg("expert_ids"), py::arg("gate_up"),
      py::arg("down"), py::arg("outputs").noconvert(), py::kw_only(), py::arg("gating") = Gating{});
  module.def("sum_choices", &sum_choices, py::arg("workbench"), py::arg("outputs").noconvert(),
             py::arg("weights"), py::arg("y"));
  module.def("count_choices", &count_choices, py::arg("expert_ids"), py::arg("counts").noconvert());
}
