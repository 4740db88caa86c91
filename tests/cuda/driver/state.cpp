// Words, faults and reports of the hostile driver, and what every call asks first.
#include "state.h"

#include <unistd.h>

#include <algorithm>
#include <set>

namespace hostile {

Driver* the_driver = nullptr;
thread_local std::vector<int> t_contexts;
thread_local bool t_calls_host = false;

bool is_sticky(int code) {
  static const std::set<int> codes{214, 220, 700, 714, 715, 716, 717, 718, 719, 721};
  return codes.contains(code);
}

void violate(const std::string& what) {
  std::lock_guard lock(the_driver->mutex);
  the_driver->violations.push_back(what);
}

uint64_t pick(uint64_t below) {
  std::lock_guard lock(the_driver->random_mutex);
  return below ? the_driver->random() % below : 0;
}

uint64_t new_id() {
  std::lock_guard lock(the_driver->mutex);
  return 0x5eed00000000ull + 16 * the_driver->next_id++;
}

// `NAME:NUMBER:CODE`, or `NAME:NUMBER` for what hangs; numbers count from now.
static CUresult set_fault(const std::string& value, bool hang) {
  const size_t first = value.find(':');
  if (first == value.npos) return CUDA_ERROR_INVALID_VALUE;
  const size_t second = value.find(':', first + 1);
  const std::string name = value.substr(0, first);
  const uint64_t number = std::stoull(value.substr(first + 1, second - first - 1));
  if (!hang && second == value.npos) return CUDA_ERROR_INVALID_VALUE;
  const int code = hang ? kHangs : std::stoi(value.substr(second + 1));
  the_driver->faults[name].push_back({the_driver->calls[name] + number, code});
  return CUDA_SUCCESS;
}

static CUresult set_word(const std::string& key, const std::string& value) {
  if (key == "fail" || key == "hang") return set_fault(value, key == "hang");
  const uint64_t number = std::stoull(value);
  if (key == "seed") {
    the_driver->random.seed(number);
  } else if (key == "late_us") {
    the_driver->late_us = number;
  } else if (key == "devices") {
    the_driver->devices = static_cast<int>(number);
    the_driver->retained.resize(number);
  } else if (key == "max_pitch") {
    the_driver->max_pitch = number;
  } else {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult set_words(const char* words) {
  const std::string text(words ? words : "");
  std::lock_guard lock(the_driver->mutex);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    begin = end + 1;
    const size_t equals = word.find('=');
    if (equals == word.npos) return CUDA_ERROR_INVALID_VALUE;
    const CUresult bad = set_word(word.substr(0, equals), word.substr(equals + 1));
    if (bad) return bad;
  }
  return CUDA_SUCCESS;
}

static int fault_of(const char* name, uint64_t number) {
  const auto found = the_driver->faults.find(name);
  if (found == the_driver->faults.end()) return CUDA_SUCCESS;
  for (const Fault& fault : found->second)
    if (fault.at == number) return fault.code;
  return CUDA_SUCCESS;
}

CUresult enter(const char* name, bool needs_context) {
  Driver* driver = the_driver;
  if (driver == nullptr || !driver->initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (driver->pid != getpid()) return CUDA_ERROR_NOT_INITIALIZED;  // it was forked after cuInit
  if (t_calls_host) {
    violate(std::string(name) + " in a host function");
    return CUDA_ERROR_NOT_PERMITTED;
  }
  if (needs_context && t_contexts.empty()) {
    violate(std::string(name) + " without a context on this thread");
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  if (needs_context && driver->sticky) return driver->sticky;
  std::lock_guard lock(driver->mutex);
  const int code = fault_of(name, ++driver->calls[name]);
  if (code == kHangs) return CUDA_SUCCESS;
  if (is_sticky(code)) driver->sticky = code;
  return code;
}

bool hangs(const char* name) {
  std::lock_guard lock(the_driver->mutex);
  return fault_of(name, the_driver->calls[name]) == kHangs;
}

}  // namespace hostile

using hostile::the_driver;

// ---- for tests

HOSTILE_API int hostile_set(const char* words) {
  return the_driver ? hostile::set_words(words) : CUDA_ERROR_NOT_INITIALIZED;
}

HOSTILE_API uint64_t hostile_calls(const char* name) {
  std::lock_guard lock(the_driver->mutex);
  return the_driver->calls[name];
}

// What was wrong since the last report, a line each, and what is alive. Forgets what was wrong.
HOSTILE_API const char* hostile_report() {
  static std::string text;
  if (!the_driver) return "";
  std::lock_guard lock(the_driver->mutex);
  text.clear();
  for (const auto& each : the_driver->violations) text += "violation: " + each + "\n";
  the_driver->violations.clear();
  const auto count = [](const char* name, size_t size) {
    return std::string(" ") + name + " " + std::to_string(size);
  };
  text += "alive:" + count("ranges", the_driver->ranges.size()) +
          count("pinned", the_driver->pinned.size()) +
          count("handles", the_driver->handles.size()) +
          count("streams", the_driver->streams.size()) +
          count("events", the_driver->events.size()) + "\n";
  return text.c_str();
}
