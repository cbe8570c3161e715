// Memory that is mapped from a file which others may truncate: that is SIGBUS for who reads it, and
// the end of the process. While a guard lives what is gone reads as zeros instead, and it says so:
// whoever computed meanwhile asks, and throws away what came of it.
#pragma once

#include <cstddef>

namespace prefilld {

class MappingGuard {
 public:
  // Borrows the memory, which is unmapped after the guard is gone. protection: as mmap was told.
  MappingGuard(void* data, size_t bytes, int protection);
  MappingGuard(const MappingGuard&) = delete;
  MappingGuard& operator=(const MappingGuard&) = delete;
  ~MappingGuard();

  bool lost() const;  // any thread

  struct Range;

 private:
  Range* const range_;
};

}  // namespace prefilld
