// Whether a job can ever run in what was reserved: asked at admission, so that nobody is told to
// come again for what will never be there.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "server/engine/memory_plan.h"
#include "server/job.h"

namespace prefilld {

struct Reserved {
  HeldBytes held{};    // kBatch: of all batches that run
  uint64_t spare = 0;  // what else may grow beyond that, together; batches may not
};
Reserved ReservedBy(const MemoryPlan& plan);

// INVALID_ARGUMENT for what needs more than is reserved and spare (a prompt in blocks of 64, say,
// of which the index is larger, or an Attend), with its bytes, and of a prompt how many tokens
// would fit. Pure; threads: any.
absl::Status CheckFits(Backend& backend, const Reserved& reserved, const Job& job);

}  // namespace prefilld
