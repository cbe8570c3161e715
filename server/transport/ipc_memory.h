// Transport cuda_ipc: device memory that callers on this host map instead of being sent bytes, what
// a posix_shm segment is in the host's memory. It is named by a descriptor, which is handed out
// over a socket of our own (descriptor_socket): who has connected and named a region has a share of
// it. So a region is in use, and counted, until everybody has unmapped it and hung up, or died;
// what comes back to us after that nobody has open, by the word of the kernel.
//
// Who knows a region's name may have it, and nobody can guess one: names are random, new each time
// that the region has a new owner, and end with that owner. Threads: any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "server/transport/descriptor_socket.h"
#include "server/transport/region.h"
#include "server/transport/transports.h"

namespace prefilld {

// What is said to the socket, and whom it opens. Shared with the regions, which may outlive the
// medium.
class RegionNames {
 public:
  // The name that a new owner's peers use; empty where the system has no random bits.
  std::string Add(const std::shared_ptr<Region>& region);
  void Add(const std::string& name, const std::shared_ptr<Region>& region);
  void Remove(const std::string& name);
  std::shared_ptr<Region> Find(const std::string& name) const;  // null: no such, or no more

 private:
  mutable absl::Mutex mutex_;
  std::unordered_map<std::string, std::weak_ptr<Region>> regions_ ABSL_GUARDED_BY(mutex_);
};

class CudaIpc final : public Medium {
 public:
  // Makes memory and its descriptor once, to see that this system can, and listens. UNIMPLEMENTED
  // on a device that shares nothing, UNAVAILABLE where the system does not tell where we are,
  // DescriptorSocket::Listen's of an address that cannot be had.
  static absl::StatusOr<std::unique_ptr<CudaIpc>> Open(const MediumSite& site);

  // Zeroed. RESOURCE_EXHAUSTED when the device has no room.
  absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes) override;
  uint64_t Unit() const override { return probe_->bytes(); }
  void Introduce(PeerFacts* ours) const override;
  // A caller of this host that works from the same GPU, or from one that reaches it.
  absl::Status Reaches(const PeerFacts& peer) const override;
  // Nobody connects from now on; who has keeps what it has.
  void Close() override;

 private:
  CudaIpc(Device& device, std::string domain) : device_(device), domain_(std::move(domain)) {}
  DescriptorSocket::Handout HandOut(const std::string& name) const;

  Device& device_;
  const std::string domain_;  // the kernel's boot id
  std::atomic<bool> closed_{false};
  const std::shared_ptr<RegionNames> names_ = std::make_shared<RegionNames>();
  std::shared_ptr<Region> probe_;             // what is opened to try it, of the least size
  std::unique_ptr<DescriptorSocket> socket_;  // uses what is above it
};

}  // namespace prefilld
