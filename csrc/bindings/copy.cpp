// kvc2._core, section "copy": the thread team, gather, scatter and copies of single buffers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "copy/pages.h"

namespace py = pybind11;

namespace kvc2::bindings {
namespace {

constexpr long kThreadsMax = 1024;  // more is a mistake in the caller's units

std::unique_ptr<ThreadTeam> make_team(long threads) {
  if (threads < 1 || threads > kThreadsMax) {
    throw py::value_error("threads is " + std::to_string(threads) + "; it may be 1 to 1024");
  }
  return std::make_unique<ThreadTeam>(static_cast<size_t>(threads));
}

PageList page_list(const py::object& segments, const py::object& pages, const py::object& offsets) {
  static_assert(sizeof(Segment) == 3 * sizeof(uint64_t));
  const auto rows = elements<uint64_t>(segments, "segments", {kAnyLength, 3});
  PageList list;
  list.segments = {reinterpret_cast<const Segment*>(rows.data()), rows.size() / 3};
  list.pages = elements<uint32_t>(pages, "pages", {kAnyLength});
  list.offsets =
      elements<uint64_t>(offsets, "offsets", {static_cast<py::ssize_t>(list.pages.size())});
  if (list.segments.empty()) throw py::value_error("segments is empty");
  return list;
}

void check_inside(const PageList& list, size_t pool_bytes, size_t arena_bytes) {
  if (const auto problem = outside(list, pool_bytes, arena_bytes)) throw py::index_error(*problem);
}

void gather_pages(ThreadTeam& team, const py::object& pool, const py::object& segments,
                  const py::object& pages, const py::object& arena, const py::object& offsets) {
  const PageList list = page_list(segments, pages, offsets);
  const Exported from(pool, "pool", false), to(arena, "arena", true);
  check_inside(list, from.bytes(), to.bytes());
  const py::gil_scoped_release released;
  gather(team, list, {from.data(), from.bytes()}, {to.data(), to.bytes()});
}

void copy_each_of(ThreadTeam& team, const py::sequence& sources, const py::sequence& targets) {
  if (sources.size() != targets.size()) {
    throw py::value_error(std::to_string(sources.size()) + " sources for " +
                          std::to_string(targets.size()) + " targets");
  }
  std::deque<Exported> exported;  // which can't be moved
  std::vector<Piece> pieces;
  for (size_t i = 0; i < sources.size(); ++i) {
    const py::object from = sources[i], to = targets[i];
    const Exported& source = exported.emplace_back(from, "sources", false);
    const Exported& target = exported.emplace_back(to, "targets", true);
    if (source.bytes() != target.bytes()) {
      throw py::value_error("sources[" + std::to_string(i) + "] has " +
                            std::to_string(source.bytes()) + " bytes, its target " +
                            std::to_string(target.bytes()));
    }
    pieces.push_back({target.data(), source.data(), source.bytes()});
  }
  const py::gil_scoped_release released;
  copy_each(team, pieces);
}

// Tells an engine in another process how far its pages are.
class Announcer {
 public:
  Announcer(const py::object& progress, uint64_t base, int event_fd)
      : base_(base), event_fd_(event_fd) {
    if (progress.is_none()) return;
    memory_.emplace(progress, "progress", true);
    if (memory_->bytes() != sizeof(uint64_t) ||
        reinterpret_cast<uintptr_t>(memory_->data()) % sizeof(uint64_t) != 0) {
      throw py::value_error("progress is not one 8-byte word at a multiple of 8");
    }
  }

  void announce(size_t layers) {
    if (memory_) {
      std::atomic_ref<uint64_t> word(*reinterpret_cast<uint64_t*>(memory_->data()));
      word.store(base_ + layers, std::memory_order_release);
    }
    if (event_fd_ < 0) return;
    const uint64_t one = 1;
    ssize_t written = 0;
    do {
      written = ::write(event_fd_, &one, sizeof one);
    } while (written < 0 && errno == EINTR);
    // a full counter (EAGAIN) wakes its reader all the same
    if (written < 0 && errno != EAGAIN) error_ = errno;
  }

  void raise_if_failed() const {
    if (error_ == 0) return;
    errno = error_;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }

 private:
  std::optional<Exported> memory_;
  uint64_t base_;
  int event_fd_;
  int error_ = 0;  // scatter reports one layer at a time and has returned when this is read
};

void scatter_pages(ThreadTeam& team, const py::object& arena, const py::object& offsets,
                   const py::object& pool, const py::object& segments, const py::object& pages,
                   const py::object& layer_ends, const py::object& progress, uint64_t progress_base,
                   int event_fd) {
  const PageList list = page_list(segments, pages, offsets);
  const auto ends = elements<uint32_t>(layer_ends, "layer_ends", {kAnyLength});
  if (!are_layer_ends(ends, list.segments.size())) {
    throw py::value_error("layer_ends does not rise to the " +
                          std::to_string(list.segments.size()) + " segments");
  }
  const Exported from(arena, "arena", false), to(pool, "pool", true);
  check_inside(list, to.bytes(), from.bytes());
  Announcer announcer(progress, progress_base, event_fd);
  {
    const py::gil_scoped_release released;
    scatter(team, list, {from.data(), from.bytes()}, {to.data(), to.bytes()}, ends,
            [&announcer](size_t layers) { announcer.announce(layers); });
  }
  announcer.raise_if_failed();
}

}  // namespace
}  // namespace kvc2::bindings

void bind_copy(py::module_& module) {
  using namespace kvc2;
  using namespace kvc2::bindings;
  py::class_<ThreadTeam>(module, "ThreadTeam")
      .def(py::init(&make_team), py::arg("threads"))
      .def_property_readonly("threads", &ThreadTeam::threads);
  module.def("gather", &gather_pages, py::arg("team"), py::arg("pool"), py::arg("segments"),
             py::arg("pages"), py::arg("arena"), py::arg("offsets"));
  module.def("scatter", &scatter_pages, py::arg("team"), py::arg("arena"), py::arg("offsets"),
             py::arg("pool"), py::arg("segments"), py::arg("pages"), py::kw_only(),
             py::arg("layer_ends"), py::arg("progress") = py::none(), py::arg("progress_base") = 0,
             py::arg("event_fd") = -1);
  module.def("copy_each", &copy_each_of, py::arg("team"), py::arg("sources"), py::arg("targets"));
  module.def("copy_backend", [] { return std::string(isa_name(copy_isa())); });
}
