// Transport posix_shm: memory that callers on this host map instead of being sent bytes, segments
// in /dev/shm. A segment is made by the server and belongs to one KV cache or one Attend. Who has
// mapped it keeps what it saw: only a segment that nobody has mapped is used again (segment_pool).
//
// The process holds a lock (flock) on each of its segments while they live. Whoever starts next on
// this /dev/shm takes away those that nobody holds: nothing outlives a kill -9 for long, and the
// segments of a server that runs are left alone.
// Threads: any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/descriptors.h"
#include "server/transport/region.h"

namespace prefilld {

// The /dev/shm of this process, and its segments in it. Owned by the server; segments may outlive
// it.
class ShmDomain final : public Medium {
 public:
  // Takes away what dead servers left, and makes a segment to see that it can. `owner`: names this
  // process, never used before; segments are named after its first 12 bytes. UNAVAILABLE says why
  // /dev/shm is of no use.
  static absl::StatusOr<std::unique_ptr<ShmDomain>> Open(
      absl::string_view owner, DescriptorShare descriptors = DescriptorShare());

  // Two processes with the same one see the same /dev/shm.
  const std::string& name() const { return name_; }

  // RESOURCE_EXHAUSTED (reason shm_memory) when there is no room, or no descriptor for it. Takes
  // the memory from the system at once (a full /dev/shm is told here and not by a signal at first
  // touch), so it blocks for as long as that takes.
  absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes) override;
  uint64_t Room() const override;
  uint64_t Largest() const override;
  void Introduce(PeerFacts* ours) const override { ours->shm_domain = name_; }
  // A caller that sees the same /dev/shm.
  absl::Status Reaches(const PeerFacts& peer) const override;

  // Removes every segment of this process; mappings stay as they are.
  void Close() override;

 private:
  ShmDomain(std::string name, std::string prefix, DescriptorShare descriptors)
      : name_(std::move(name)), prefix_(std::move(prefix)), descriptors_(std::move(descriptors)) {}

  const std::string name_;
  const std::string prefix_;           // of the files of our segments
  const DescriptorShare descriptors_;  // a segment has one
  std::atomic<uint64_t> next_{1};
  std::atomic<bool> closed_{false};
};

}  // namespace prefilld
