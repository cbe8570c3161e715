// Stage 3 on CUDA: block-sparse attention by two sets of kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

#include "kernels/cuda/launch.h"

namespace prefilld::cuda {

// AttendSm90 and AttendSm80 both write o and lse of every query, read nothing of the method but
// count and index, and each gives the same bits for the same input every time. A row without a
// block gets 0 and -infinity. The workspace is 16-byte aligned.
size_t AttendWorkspace(const Problem& problem);
cudaError_t AttendSm90(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream);
cudaError_t AttendSm80(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream);
// What has a kernel: the tables that Supports() asks and the launchers choose from. The sm80 set
// has all of AttendDTypes() and AttendHeadDims().
std::span<const DType> AttendDTypes();
std::span<const int> AttendHeadDims();
bool HasAttendSm90(DType dtype, int head_dim, int block_size);
bool HasAttendSm80(DType dtype, int head_dim, int block_size);

}  // namespace prefilld::cuda
