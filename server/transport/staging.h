// The way of an Attend's tensors to a device that has memory of its own: through pinned host
// memory, in groups, each enqueued as soon as its bytes are there, so that the copies of one job
// run while another one computes, and while its own bytes still arrive.
//
// Also of tensors in a posix_shm segment: to pin that for one call takes the driver several times
// as long as to copy it, and holds up whoever launches kernels meanwhile.
//
// Owned by the job, which keeps the device's side of the tensors alive until this is gone. The RPC
// thread alone calls it, until Scheduler::UploadDone; whoever comes after UploadDone waits for the
// upload stream. No call waits for the device; the destructor does, when copies may still read what
// it frees.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace prefilld {

class Staging {
 public:
  // Bytes of a tensor that travel together: enough to reach the bus's rate, few enough that the
  // last copy is short when the last byte arrives.
  static constexpr uint64_t kGroupBytes = uint64_t{4} << 20;

  struct Tensor {
    void* device;  // the job's
    uint64_t bytes;
    void* host = nullptr;  // pinned; set by the staging
  };

  // RESOURCE_EXHAUSTED when there is no pinned memory.
  static absl::StatusOr<std::shared_ptr<Staging>> Create(Device& device,
                                                         std::vector<Tensor> tensors);
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  const std::vector<Tensor>& tensors() const { return tensors_; }

  // Somebody has written the first `bytes` of this tensor to its place on the host; tensors come in
  // order. Enqueues the groups that are complete by now.
  absl::Status Arrived(size_t tensor, uint64_t bytes);
  // Writes a whole tensor, and enqueues what it has written while it goes on.
  absl::Status CopyFrom(size_t tensor, const void* source);

  // The job was computed, so all that was enqueued is done: there is nothing to wait for any more.
  void Computed() { any_ = false; }

 private:
  explicit Staging(Device& device) : device_(device) {}
  absl::Status Enqueue(const Tensor& tensor, uint64_t end);

  Device& device_;
  std::vector<Tensor> tensors_;
  Buffer host_;
  size_t current_ = 0;     // the tensor that arrives
  uint64_t enqueued_ = 0;  // its bytes that are on their way
  bool any_ = false;       // something was enqueued
};

}  // namespace prefilld
