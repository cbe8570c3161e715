// A transformer's operations on CUDA: products by cuBLASLt, kernels (elementwise.h) between them.
// Weights are copied to the device when they are prepared. Rows are of the weights' dtype.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cuda/device/cuda_device.h"
#include "kernels/ops.h"

namespace prefilld::cuda {

// UNAVAILABLE where there is no cuBLASLt. The device outlives it. cache_dir: where the choice of
// algorithms is kept; empty: nowhere.
absl::StatusOr<std::unique_ptr<Ops>> CreateOps(CudaDevice& device, const std::string& cache_dir);

}  // namespace prefilld::cuda
