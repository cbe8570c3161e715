// Shared memory that callers on this host map instead of being sent bytes: POSIX segments in
// /dev/shm. A segment is made by the server, belongs to one KV cache or one Attend, and is never
// used again, so that who has mapped it keeps what it saw.
//
// The process holds a lock (flock) on each of its segments while they live. Whoever starts next on
// this /dev/shm takes away those that nobody holds: nothing outlives a kill -9 for long, and the
// segments of a server that runs are left alone.
//
// A peer may change what it has mapped at any time: nothing read from a segment may be used as an
// index or a size. Threads: any.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace prefilld {

// Tensors in a segment start at multiples of this.
inline constexpr uint64_t kShmAlignment = 64;
constexpr uint64_t ShmAligned(uint64_t bytes) {
  return (bytes + kShmAlignment - 1) / kShmAlignment * kShmAlignment;
}

// One segment, mapped for reading and writing, zeroed. Memory and name go with it.
class ShmSegment {
 public:
  ShmSegment(const ShmSegment&) = delete;
  ShmSegment& operator=(const ShmSegment&) = delete;
  ~ShmSegment();

  const std::string& name() const { return name_; }  // what shm_open(3) takes
  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  // Nobody can open it from now on; mappings stay, ours too.
  void Unlink();

 private:
  friend class ShmDomain;
  ShmSegment(std::string name, int fd) : name_(std::move(name)), fd_(fd) {}

  const std::string name_;
  const int fd_;  // holds the lock
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
  std::atomic<bool> linked_{true};
};

// The /dev/shm of this process, and its segments in it. Owned by the server; segments may outlive
// it.
class ShmDomain {
 public:
  // Takes away what dead servers left, and makes a segment to see that it can. `owner`: names this
  // process, never used before; segments are named after its first 12 bytes. UNAVAILABLE says why
  // /dev/shm is of no use.
  static absl::StatusOr<std::unique_ptr<ShmDomain>> Open(absl::string_view owner);

  // Two processes with the same one see the same /dev/shm.
  const std::string& name() const { return name_; }

  // RESOURCE_EXHAUSTED (reason shm_memory) when there is no room. Takes the memory from the system
  // at once (a full /dev/shm is told here and not by a signal at first touch), so it blocks for as
  // long as that takes.
  absl::StatusOr<std::shared_ptr<ShmSegment>> Create(uint64_t bytes);

  // Removes every segment of this process; Create refuses from now on. For the end of the process:
  // mappings stay as they are.
  void UnlinkAll();

 private:
  ShmDomain(std::string name, std::string prefix)
      : name_(std::move(name)), prefix_(std::move(prefix)) {}

  const std::string name_;
  const std::string prefix_;  // of the files of our segments
  std::atomic<uint64_t> next_{1};
  std::atomic<bool> closed_{false};
};

}  // namespace prefilld
