// Transport cuda_ipc: device memory that callers on this host open instead of being sent bytes,
// what a posix_shm segment is in the host's memory. Made by the server for one Attend and never
// used again, so whatever a caller does to it, it does to its own call.
//
// Who opens it has to close it before it is freed: CUDA promises nothing to those who come late. So
// the call's end waits for the caller (AttendReactor), but never for long. Threads: any.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "server/transport/region.h"

namespace prefilld {

class CudaIpc final : public Medium {
 public:
  // Exports memory once, to see that this system can: callers are told at Negotiate, not in a call.
  // UNIMPLEMENTED on a device that shares nothing, UNAVAILABLE where the system does not tell where
  // we are.
  static absl::StatusOr<std::unique_ptr<CudaIpc>> Open(Device& device);

  // `domain`: two processes with the same one can open each other's device memory: the kernel's
  // boot id, ":", the number of the PID namespace.
  CudaIpc(Device& device, std::string domain) : device_(device), domain_(std::move(domain)) {}

  // Zeroed. RESOURCE_EXHAUSTED when the device has no room.
  absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes) override;
  void Introduce(PeerFacts* ours) const override;
  // A caller of this host that has its tensors on the same GPU.
  absl::Status Reaches(const PeerFacts& peer) const override;

 private:
  Device& device_;
  const std::string domain_;
};

}  // namespace prefilld
