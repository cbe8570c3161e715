// A file that may be replaced while the server runs: by renaming another over it, by writing it
// anew, or by pointing a link that leads to it elsewhere, as Kubernetes does.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace prefilld {

class WatchedFile {
 public:
  explicit WatchedFile(std::string path) : path_(std::move(path)) {}

  // NOT_FOUND says why it cannot be read, RESOURCE_EXHAUSTED that it is over the limit. Takes note
  // of what it is like now, and before it is read: a change meanwhile is one.
  absl::StatusOr<std::string> Read(size_t bytes_max = size_t{1} << 20);
  // Since Read.
  bool Changed() const { return Look() != seen_; }
  const std::string& path() const { return path_; }

 private:
  // Device, inode, size, time of change and of its contents' in ns; zeros: there is none.
  using Facts = std::array<int64_t, 5>;
  Facts Look() const;

  std::string path_;
  Facts seen_{};
};

}  // namespace prefilld
