// Transport posix_shm: memory of the host that callers map instead of being sent bytes. A segment
// is a file without a name (memfd_create) whose size is sealed: nobody, whoever has its descriptor,
// can truncate it under those who have it mapped. What only we are to write is sealed against that
// too. It needs no room in /dev/shm, and nothing of it outlives the processes that have it open.
// Threads: any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/descriptors.h"
#include "server/transport/region.h"
#include "server/transport/region_names.h"

namespace prefilld {

// Owned by the server; segments may outlive it.
class PosixShm final : public Medium {
 public:
  // Makes a segment to see that it can. UNAVAILABLE says why this system has no such memory.
  static absl::StatusOr<std::unique_ptr<PosixShm>> Open(
      std::shared_ptr<RegionNames> names, DescriptorShare segments = DescriptorShare());

  // RESOURCE_EXHAUSTED (reason shm_memory) when there is no memory, or no descriptor for it. Takes
  // the memory from the system at once: what there is not is told here and not by a signal at first
  // touch.
  absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes, PeerAccess access) override;
  void Introduce(PeerFacts* ours) const override { ours->shm_domain = domain_; }
  // A caller on this host. Whether it reaches our socket it finds out itself.
  absl::Status Reaches(const PeerFacts& peer) const override;
  void Close() override { closed_ = true; }

 private:
  PosixShm(std::string domain, std::shared_ptr<RegionNames> names, DescriptorShare segments)
      : domain_(std::move(domain)), names_(std::move(names)), segments_(std::move(segments)) {}

  const std::string domain_;  // "memfd:" and the kernel's boot id
  const std::shared_ptr<RegionNames> names_;
  const DescriptorShare segments_;  // one each, as long as it lives
  std::atomic<bool> closed_{false};
  std::shared_ptr<Region> probe_;  // what is opened to try it
};

}  // namespace prefilld
