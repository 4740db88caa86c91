// kvc2._core, section "beat": tells a peer that this process runs, also while Python can't.
// The one clock and the one socket of csrc/: a thread of Python's would wait for the GIL.
#include <fcntl.h>
#include <poll.h>
#include <pybind11/pybind11.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <memory>
#include <string>
#include <thread>

namespace py = pybind11;

namespace kvc2::bindings {
namespace {

constexpr double kIntervalMax = 3600;  // s; more is a mistake in the caller's units

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {
    if (fd >= 0) return;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  ~Descriptor() { ::close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  const int fd_;
};

// Sends one byte on `fd` now and every interval, until it is closed or the peer is gone.
class Beat {
 public:
  Beat(int fd, int interval_ms)
      : fd_(::fcntl(fd, F_DUPFD_CLOEXEC, 0)), stop_(::eventfd(0, EFD_CLOEXEC)) {
    sigset_t all, before;  // signals go to Python's threads, which wait for them
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this, interval_ms] { run(interval_ms); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  ~Beat() { close(); }

  // Returns when no more is sent; the descriptors go with this object. Idempotent.
  void close() {
    if (!thread_.joinable()) return;
    if (::getpid() != process_) return thread_.detach();  // a forked child: the thread is not here
    eventfd_write(stop_, 1);
    thread_.join();
  }

 private:
  void run(int interval_ms) {
    const char beat = 1;
    pollfd stop{stop_, POLLIN, 0};
    do {
      const ssize_t sent = ::send(fd_, &beat, sizeof beat, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent < 0 && errno != EAGAIN) return;  // a full socket's peer may read again, another not
    } while (::poll(&stop, 1, interval_ms) == 0);
  }

  const Descriptor fd_, stop_;
  const pid_t process_ = ::getpid();
  std::thread thread_;
};

std::unique_ptr<Beat> make_beat(int fd, double interval_s) {
  if (!(interval_s >= 0.001 && interval_s <= kIntervalMax)) {
    throw py::value_error("interval_s is " + std::to_string(interval_s) +
                          "; it may be 0.001 to 3600");
  }
  return std::make_unique<Beat>(fd, static_cast<int>(interval_s * 1000));
}

}  // namespace
}  // namespace kvc2::bindings

void bind_beat(py::module_& module) {
  using namespace kvc2::bindings;
  py::class_<Beat>(module, "Beat")
      .def(py::init(&make_beat), py::arg("fd"), py::arg("interval_s"))
      .def("close", &Beat::close, py::call_guard<py::gil_scoped_release>());
}
