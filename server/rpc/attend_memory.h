// The memory of one Attend, taken after its bytes are in the budget and before one of them is read:
// buffers of the device, pinned memory on the way there and back, or a region that the caller
// opens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "server/rpc/upload.h"
#include "server/rpc/validate.h"
#include "server/transport/region.h"
#include "server/transport/staging.h"

namespace prefilld {

// Where the tensors lie. The job owns all of it.
struct AttendMemory {
  std::vector<Upload::Tensor> upload;  // where the announced tensors are put, in their order
  // What the caller opens, null over gRPC; and the places in it of the announced inputs, then of
  // the outputs, each with room for its upper bound.
  Region* region = nullptr;
  std::vector<uint64_t> inputs, outputs;
  Staging* staging = nullptr;  // null where nothing moves to a device
};

// Takes what the job of `valid` needs and sets its buffers. `medium`: of valid.transport, null over
// gRPC. RESOURCE_EXHAUSTED when there is no room. Blocks for as long as the system needs to find
// it.
absl::StatusOr<AttendMemory> TakeMemory(const ValidAttend& valid, Device& device, Medium* medium);

}  // namespace prefilld
