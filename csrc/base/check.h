// A broken invariant ends the process with the facts: a cache that goes on after one would serve
// wrong bytes. Not for bad input: that is an error value or an exception at the binding.
#pragma once

#include <cstdio>
#include <cstdlib>

#define KVC2_CHECK(condition, ...)                                                       \
  do {                                                                                   \
    if (!(condition)) [[unlikely]] {                                                     \
      std::fprintf(stderr, "%s:%d: check failed: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                                 \
      std::fputc('\n', stderr);                                                          \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)
