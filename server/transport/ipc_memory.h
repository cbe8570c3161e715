// Transport cuda_ipc: device memory that callers on this host map instead of being sent bytes, what
// posix_shm is in the host's memory. Threads: any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "server/transport/region.h"
#include "server/transport/region_names.h"

namespace prefilld {

class CudaIpc final : public Medium {
 public:
  // Makes memory and its descriptor once, to see that this system can. UNIMPLEMENTED on a device
  // that shares nothing, UNAVAILABLE where the system does not tell where we are. The device
  // outlives it.
  static absl::StatusOr<std::unique_ptr<CudaIpc>> Open(Device& device,
                                                       std::shared_ptr<RegionNames> names);

  // Zeroed. RESOURCE_EXHAUSTED when the device has no room. Peers may write: its driver has no
  // mappings that only read.
  absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes, PeerAccess access) override;
  uint64_t Unit() const override { return probe_->bytes(); }
  void Introduce(PeerFacts* ours) const override;
  // A caller of this host that works from the same GPU, or from one that reaches it.
  absl::Status Reaches(const PeerFacts& peer) const override;
  void Close() override { closed_ = true; }

 private:
  CudaIpc(Device& device, std::string domain, std::shared_ptr<RegionNames> names)
      : device_(device), domain_(std::move(domain)), names_(std::move(names)) {}

  Device& device_;
  const std::string domain_;  // the kernel's boot id
  const std::shared_ptr<RegionNames> names_;
  std::atomic<bool> closed_{false};
  std::shared_ptr<Region> probe_;  // what is opened to try it, of the least size
};

}  // namespace prefilld
