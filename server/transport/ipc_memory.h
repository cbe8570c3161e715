// Device memory that callers on this host open instead of being sent bytes: what a posix_shm
// segment is in the host's memory. Made by the server for one Attend and never used again, so
// whatever a caller does to it, it does to its own call.
//
// Who opens it has to close it before it is freed: CUDA promises nothing to those who come late. So
// the call's end waits for the caller (AttendReactor), but never for long. Threads: any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace prefilld {

// Two processes with the same one can open each other's device memory: the kernel's boot id, ":",
// the number of the PID namespace. Empty when the system does not tell.
std::string CudaIpcDomain();

class IpcMemory {
 public:
  // Zeroed. RESOURCE_EXHAUSTED when the device has no room; UNIMPLEMENTED on one that shares
  // nothing.
  static absl::StatusOr<std::shared_ptr<IpcMemory>> Create(Device& device, uint64_t bytes);

  std::byte* data() const { return memory_.as<std::byte>(); }
  uint64_t bytes() const { return memory_.bytes(); }
  const std::string& handle() const { return handle_; }
  const std::string& device_uuid() const { return device_uuid_; }

 private:
  IpcMemory(Buffer memory, std::string handle, std::string device_uuid)
      : memory_(std::move(memory)),
        handle_(std::move(handle)),
        device_uuid_(std::move(device_uuid)) {}

  const Buffer memory_;
  const std::string handle_;
  const std::string device_uuid_;
};

}  // namespace prefilld
