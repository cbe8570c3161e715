// For tests alone: what a kernel with a bug does to the device.
#pragma once

#include <cuda_runtime_api.h>

namespace prefilld::cuda {

// Enqueues a write through a null pointer: an illegal address, which no context survives.
cudaError_t WriteToNull(cudaStream_t stream);
// Enqueues a kernel that never ends.
cudaError_t NeverEnd(cudaStream_t stream);

}  // namespace prefilld::cuda
