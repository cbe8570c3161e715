// What a fuzzer promises beside not crashing.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace prefilld {

// Ends the process, which is a finding, unless the promise is kept. `seen` is what it was not.
inline void Promise(bool kept, const char* promise, const std::string& seen = "") {
  if (kept) return;
  std::fprintf(stderr, "broken promise: %s: %s\n", promise, seen.c_str());
  std::abort();
}

}  // namespace prefilld
