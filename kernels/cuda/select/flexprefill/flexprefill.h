// FlexPrefill, stages 1 and 2, on CUDA; kernels/cpu/flexprefill.h says what it computes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/cuda/select/selection.h"

namespace prefilld::cuda {

// Whether every kernel of FlexPrefill exists for these.
bool HasFlexPrefill(DType dtype, int head_dim);
// Bytes of workspace that Estimate, Select and the measurement of captured mass share.
size_t FlexPrefillWorkspace(const Problem& problem);
cudaError_t FlexPrefillEstimate(const Selection& selection, int multiprocessors,
                                cudaStream_t stream);
cudaError_t FlexPrefillSelect(const Selection& selection, int multiprocessors, cudaStream_t stream);

}  // namespace prefilld::cuda
