// engine._kernels: what a step computes around products and attention. Arrays are numpy's: float32,
// or uint16 that holds bfloat16. A wrong dtype or shape is a ValueError that names the argument.
#include "decoder/decoder.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "bindings/kernels.h"
#include "bindings/sequences.h"

namespace py = pybind11;
namespace kvc2 {
namespace {

using Floats = std::optional<ArrayOf<float>>;

// How experts are chosen; keeps the arrays that it reads.
struct ChoiceRule {
  decoder::Choice choice{};
  Floats bias, selection_bias;

  // For logits of so many experts.
  decoder::Choice of(py::ssize_t experts, decoder::Type type) const {
    decoder::Choice made = choice;
    made.type = type, made.experts = size(experts);
    if (made.experts > decoder::kMostExperts || made.experts % made.groups != 0 ||
        made.chosen > made.experts / made.groups * made.chosen_groups) {
      throw py::value_error(
          "logits must be of a multiple of `groups` experts, at most 1024, and "
          "the chosen groups must hold experts_per_token");
    }
    for (const auto& [array, name] :
         {std::pair{&bias, "bias"}, {&selection_bias, "selection_bias"}}) {
      if (*array) check_array(**array, name, (*array)->dtype(), {experts});
    }
    if (bias) made.bias = bias->data();
    if (selection_bias) made.selection_bias = selection_bias->data();
    return made;
  }
};

decoder::Scoring scoring_of(const std::string& name) {
  if (name == "softmax") return decoder::Scoring::kSoftmax;
  if (name == "sigmoid") return decoder::Scoring::kSigmoid;
  throw py::value_error("scoring may be softmax or sigmoid, not '" + name + "'");
}

struct Groups {
  size_t all, chosen;
};

ChoiceRule make_rule(size_t chosen, const std::string& scoring, bool normalize, float scale,
                     const Groups& groups) {
  if (chosen < 1) throw py::value_error("experts_per_token must be at least 1");
  if (groups.chosen < 1 || groups.chosen > groups.all) {
    throw py::value_error("chosen_groups must be 1 to `groups`");
  }
  ChoiceRule made;
  made.choice.chosen = chosen, made.choice.scoring = scoring_of(scoring);
  made.choice.normalize = normalize, made.choice.scale = scale;
  made.choice.groups = groups.all, made.choice.chosen_groups = groups.chosen;
  return made;
}

decoder::Type type_of(const py::array& x, const char* name) {
  if (x.dtype().kind() == 'f' && x.itemsize() == 4) return decoder::Type::kFloat32;
  if (x.dtype().kind() == 'u' && x.itemsize() == 2) return decoder::Type::kBfloat16;
  throw py::value_error(std::string(name) + " must be float32, or uint16 that holds bfloat16");
}

void choose(Workbench& workbench, const ChoiceRule& rule, const py::array& logits,
            ArrayOf<int64_t>& expert_ids, ArrayOf<float>& weights) {
  check_array(logits, "logits", logits.dtype(), {-1, -1});
  const auto tokens = logits.shape(0);
  decoder::Choice call = rule.of(logits.shape(1), type_of(logits, "logits"));
  const auto chosen = static_cast<py::ssize_t>(call.chosen);
  check_array(expert_ids, "expert_ids", expert_ids.dtype(), {tokens, chosen});
  check_array(weights, "weights", weights.dtype(), {tokens, chosen});
  call.logits = logits.data();
  call.expert_ids = expert_ids.mutable_data(), call.weights = weights.mutable_data();
  const py::gil_scoped_release released;
  decoder::kernels(workbench.isa).choose(call, 0, size(tokens));
}

struct Angles {
  const ArrayOf<float>& cosines;
  const ArrayOf<float>& sines;
};

using Optional = std::optional<py::array>;

// As decoder::Layer; what may be left out is optional.
struct LayerWeights {
  const py::array &attention_norm, &qkv, &out, &feed_forward_norm;
  py::array &key_pages, &value_pages;
  const Optional &query_norm, &key_norm, &router;
  const std::optional<ChoiceRule>& rule;
};

struct Buffers {
  py::array& x;
  py::array& normed;
  ArrayOf<int64_t>& expert_ids;
  ArrayOf<float>& weights;
};

// decoder::Decoder over arrays, which it keeps.
class Decoder {
 public:
  Decoder(Workbench& workbench, const Angles& angles, py::ssize_t query_heads, float eps)
      : workbench_(workbench), angles_{angles.cosines, angles.sines} {
    check_array(angles.cosines, "cosines", angles.cosines.dtype(), {-1, -1});
    check_array(angles.sines, "sines", angles.sines.dtype(),
                {angles.cosines.shape(0), angles.cosines.shape(1)});
    if (query_heads < 1) throw py::value_error("query_heads must be at least 1");
    shape_.query_heads = size(query_heads), shape_.eps = eps;
    shape_.cosines = angles.cosines.data(), shape_.sines = angles.sines.data();
  }

  void add_layer(const LayerWeights& w) {
    if (layers_.empty()) take_shape(w);
    const py::dtype type = w.attention_norm.dtype();
    const auto hidden = static_cast<py::ssize_t>(shape_.hidden);
    const auto head = static_cast<py::ssize_t>(shape_.head_size);
    const auto heads = static_cast<py::ssize_t>(shape_.query_heads);
    const auto kv_heads = static_cast<py::ssize_t>(shape_.kv_heads);
    check_array(w.attention_norm, "attention_norm", type, {hidden});
    check_array(w.feed_forward_norm, "feed_forward_norm", type, {hidden});
    check_array(w.qkv, "qkv", type, {(heads + 2 * kv_heads) * head, hidden});
    check_array(w.out, "out", type, {hidden, heads * head});
    check_pages(w.key_pages, "key_pages", type);
    check_pages(w.value_pages, "value_pages", type);
    if (w.query_norm) check_array(*w.query_norm, "query_norm", type, {head});
    if (w.key_norm) check_array(*w.key_norm, "key_norm", type, {head});
    if (w.router.has_value() != w.rule.has_value()) {
      throw py::value_error("router and rule go together");
    }
    decoder::Layer layer{};
    layer.attention_norm = kept(w.attention_norm), layer.qkv = kept(w.qkv);
    layer.out = kept(w.out), layer.feed_forward_norm = kept(w.feed_forward_norm);
    layer.query_norm = kept(w.query_norm), layer.key_norm = kept(w.key_norm);
    kept(w.key_pages), kept(w.value_pages);
    layer.keys = w.key_pages.mutable_data(), layer.values = w.value_pages.mutable_data();
    if (w.router) {
      check_array(*w.router, "router", type, {-1, hidden});
      layer.router = kept(w.router);
      layer.choice = w.rule->of(w.router->shape(0), shape_.type);
      if (chosen_ == 0) chosen_ = layer.choice.chosen;
      if (chosen_ != layer.choice.chosen) {
        throw py::value_error("rule must choose as many experts in every layer");
      }
      rules_.push_back(*w.rule);
    }
    layers_.push_back(layer);
  }

  void begin(const ArrayOf<int64_t>& positions, const Sequences& sequences, const Places& places,
             const Buffers& buffers) {
    step_.reset();
    if (layers_.empty()) throw py::value_error("there are no layers yet");
    const auto tokens = positions.size(), hidden = static_cast<py::ssize_t>(shape_.hidden);
    check_array(positions, "positions", positions.dtype(), {-1});
    for (py::ssize_t i = 0; i < tokens; ++i) {
      const int64_t position = positions.data()[i];
      if (position < 0 || position >= angles_[0].shape(0)) {
        throw py::value_error("positions must lie in the tables of angles");
      }
    }
    const attention::Pages pages = this->pages();
    check_sequences(sequences, pages, tokens);
    check_places(places, pages, tokens);
    const auto chosen = static_cast<py::ssize_t>(chosen_);
    check_array(buffers.x, "x", type_, {tokens, hidden});
    check_array(buffers.normed, "normed", type_, {tokens, hidden});
    check_array(buffers.expert_ids, "expert_ids", buffers.expert_ids.dtype(), {tokens, chosen});
    check_array(buffers.weights, "weights", buffers.weights.dtype(), {tokens, chosen});
    of_step_ = {positions,
                sequences.query_lens,
                sequences.context_lens,
                sequences.block_tables,
                places.page_ids,
                places.offsets,
                buffers.x,
                buffers.normed,
                buffers.expert_ids,
                buffers.weights};
    step_ = decoder::Step{size(tokens),
                          size(sequences.query_lens.size()),
                          size(sequences.block_tables.shape(1)),
                          positions.data(),
                          sequences.query_lens.data(),
                          sequences.context_lens.data(),
                          sequences.block_tables.data(),
                          places.page_ids.data(),
                          places.offsets.data(),
                          buffers.x.mutable_data(),
                          buffers.normed.mutable_data(),
                          buffers.expert_ids.mutable_data(),
                          buffers.weights.mutable_data()};
  }

  void run(size_t layer, const Optional& add) {
    if (!step_) throw py::value_error("no step has begun");
    if (layer >= layers_.size()) throw py::value_error("layer must be one of those added");
    const void* more = added(add);
    const py::gil_scoped_release released;
    const std::lock_guard lock(workbench_.mutex);
    decoder_->run(layers_[layer], *step_, more, workbench_.workspace);
  }

  void finish(const py::array& norm, const ArrayOf<int64_t>& rows, const Optional& add,
              py::array& normed) {
    if (!step_) throw py::value_error("no step has begun");
    const auto hidden = static_cast<py::ssize_t>(shape_.hidden);
    check_array(norm, "norm", type_, {hidden});
    check_array(rows, "rows", rows.dtype(), {-1});
    check_array(normed, "normed", type_, {rows.size(), hidden});
    for (py::ssize_t i = 0; i < rows.size(); ++i) {
      if (rows.data()[i] < 0 || size(rows.data()[i]) >= step_->tokens ||
          (i > 0 && rows.data()[i] <= rows.data()[i - 1])) {  // each gets its `add` once
        throw py::value_error("rows must be tokens of the step, rising");
      }
    }
    decoder_->finish({norm.data(), rows.data(), size(rows.size()), normed.mutable_data()}, *step_,
                     added(add));
  }

 private:
  void take_shape(const LayerWeights& w) {
    type_ = w.attention_norm.dtype();
    shape_.type = type_of(w.attention_norm, "attention_norm");
    if (w.attention_norm.ndim() != 1) throw py::value_error("attention_norm has a wrong shape");
    shape_.hidden = size(w.attention_norm.shape(0));
    const attention::Pages pages = pages_of(w.key_pages, "key_pages");
    if (pages.stride != pages.size) throw py::value_error("key_pages is not contiguous");
    if (pages.kv_heads == 0 || shape_.query_heads % pages.kv_heads != 0) {
      throw py::value_error("query_heads must be a multiple of the pages' heads");
    }
    if (pages.size != 2 * size(angles_[0].shape(1))) {
      throw py::value_error("cosines must have half a head's size");
    }
    shape_.kv_heads = pages.kv_heads, shape_.head_size = pages.size;
    shape_.page_size = pages.page_size, shape_.pages = pages.pages;
    decoder_.emplace(workbench_.isa, shape_);
  }

  attention::Pages pages() const {
    return {shape_.pages, shape_.kv_heads, shape_.page_size, shape_.head_size, shape_.head_size};
  }

  void check_pages(const py::array& pages, const char* name, const py::dtype& type) const {
    const auto of = [](size_t n) { return static_cast<py::ssize_t>(n); };
    check_array(
        pages, name, type,
        {of(shape_.pages), of(shape_.kv_heads), of(shape_.page_size), of(shape_.head_size)});
  }

  const void* kept(const py::array& array) {
    arrays_.push_back(array);
    return array.data();
  }
  const void* kept(const Optional& array) { return array ? kept(*array) : nullptr; }

  const void* added(const Optional& add) const {
    if (!add) return nullptr;
    const auto of = [](size_t n) { return static_cast<py::ssize_t>(n); };
    check_array(*add, "add", type_, {of(step_->tokens), of(shape_.hidden)});
    return add->data();
  }

  Workbench& workbench_;
  const std::vector<ArrayOf<float>> angles_;
  decoder::Shape shape_{};
  py::dtype type_;
  std::optional<decoder::Decoder> decoder_;
  std::vector<decoder::Layer> layers_;
  std::vector<py::array> arrays_;  // of the layers
  std::vector<ChoiceRule> rules_;
  size_t chosen_ = 0;
  std::optional<decoder::Step> step_;
  std::vector<py::array> of_step_;
};

void bind_choice(py::module_& module) {
  py::class_<ChoiceRule>(module, "ChoiceRule")
      .def(py::init([](size_t chosen, const std::string& scoring, bool normalize, float scale,
                       size_t groups, size_t chosen_groups, const Floats& bias,
                       const Floats& selection_bias) {
             ChoiceRule made =
                 make_rule(chosen, scoring, normalize, scale, {groups, chosen_groups});
             made.bias = bias, made.selection_bias = selection_bias;
             return made;
           }),
           py::arg("experts_per_token"), py::kw_only(), py::arg("scoring") = "softmax",
           py::arg("normalize") = true, py::arg("scale") = 1.0f, py::arg("groups") = 1,
           py::arg("chosen_groups") = 1, py::arg("bias") = py::none(),
           py::arg("selection_bias") = py::none());
  module.def("choose", &choose, py::arg("workbench"), py::arg("rule"), py::arg("logits"),
             py::arg("expert_ids").noconvert(), py::arg("weights").noconvert());
}

}  // namespace
}  // namespace kvc2

void bind_decoder(pybind11::module_& module) {
  using namespace kvc2;
  bind_choice(module);
  py::class_<Decoder>(module, "Decoder")
      .def(py::init([](Workbench& workbench, const ArrayOf<float>& cosines,
                       const ArrayOf<float>& sines, py::ssize_t query_heads, float eps) {
             return std::make_unique<Decoder>(workbench, Angles{cosines, sines}, query_heads, eps);
           }),
           py::arg("workbench"), py::arg("cosines"), py::arg("sines"), py::kw_only(),
           py::arg("query_heads"), py::arg("eps"), py::keep_alive<1, 2>())
      .def(
          "add_layer",
          [](Decoder& decoder, const py::array& attention_norm, const py::array& qkv,
             const py::array& out, const py::array& feed_forward_norm, py::array& key_pages,
             py::array& value_pages, const Optional& query_norm, const Optional& key_norm,
             const Optional& router, const std::optional<ChoiceRule>& rule) {
            decoder.add_layer({attention_norm, qkv, out, feed_forward_norm, key_pages, value_pages,
                               query_norm, key_norm, router, rule});
          },
          py::kw_only(), py::arg("attention_norm"), py::arg("qkv"), py::arg("out"),
          py::arg("feed_forward_norm"), py::arg("key_pages"), py::arg("value_pages"),
          py::arg("query_norm") = py::none(), py::arg("key_norm") = py::none(),
          py::arg("router") = py::none(), py::arg("rule") = py::none())
      .def(
          "begin",
          [](Decoder& decoder, const ArrayOf<int64_t>& positions,
             const ArrayOf<int32_t>& query_lens, const ArrayOf<int32_t>& context_lens,
             const ArrayOf<int32_t>& block_tables, const ArrayOf<int64_t>& page_ids,
             const ArrayOf<int64_t>& offsets, py::array& x, py::array& normed,
             ArrayOf<int64_t>& expert_ids, ArrayOf<float>& weights) {
            decoder.begin(positions, {query_lens, context_lens, block_tables}, {page_ids, offsets},
                          {x, normed, expert_ids, weights});
          },
          py::arg("positions"), py::arg("query_lens"), py::arg("context_lens"),
          py::arg("block_tables"), py::arg("page_ids"), py::arg("offsets"), py::arg("x"),
          py::arg("normed"), py::arg("expert_ids").noconvert(), py::arg("weights").noconvert())
      .def("run", &Decoder::run, py::arg("layer"), py::arg("add") = py::none())
      .def("finish", &Decoder::finish, py::arg("norm"), py::arg("rows"), py::arg("add"),
           py::arg("normed"));
}
