// joint, stages 1 and 2, on CUDA; kernels/cpu/joint.h says what it computes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/cuda/select/selection.h"

namespace prefilld::cuda {

// Whether every kernel of joint exists for these.
bool HasJoint(DType dtype, int head_dim);
// Bytes of workspace that Estimate, Select and the measurement of captured mass share.
size_t JointWorkspace(const Problem& problem);
cudaError_t JointEstimate(const Selection& selection, int multiprocessors, cudaStream_t stream);
cudaError_t JointSelect(const Selection& selection, int multiprocessors, cudaStream_t stream);

}  // namespace prefilld::cuda
