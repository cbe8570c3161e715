// cudaError_t becomes absl::Status here and nowhere else.
#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include "absl/status/status.h"

namespace prefilld::cuda {

// Empty for an error that later calls survive; else what it is called in Device::kFaultKinds: the
// context is lost, and with it every call that this process still makes.
const char* FaultKind(cudaError_t error);

// "attend: cudaErrorMemoryAllocation: out of memory". RESOURCE_EXHAUSTED for memory, else INTERNAL.
absl::Status ToStatus(cudaError_t error, std::string_view what);

}  // namespace prefilld::cuda
