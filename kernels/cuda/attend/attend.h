// Stage 3 on CUDA: block-sparse attention by two sets of kernels, and by a plain one in F32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

#include "kernels/cuda/launch.h"

namespace prefilld::cuda {

// AttendSm90, AttendSm80 and AttendF32 all write o and lse of every query, read nothing of the
// method but count and index, and each gives the same bits for the same input every time. A row
// without a block gets 0 and -infinity. The workspace is 16-byte aligned.
size_t AttendWorkspace(const Problem& problem);
cudaError_t AttendSm90(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream);
cudaError_t AttendSm80(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream);
cudaError_t AttendF32(const Problem& problem, void* workspace, int multiprocessors,
                      cudaStream_t stream);  // uses no workspace
// What has a kernel: the tables that Supports() asks and the launchers choose from. The sm80 set
// has all of BF16 and F16 that the sm90 set has, and AttendF32 all of F32.
bool HasAttendSm90(DType dtype, int head_dim, int block_size);
bool HasAttendSm80(DType dtype, int head_dim, int block_size);
bool HasAttendF32(DType dtype, int head_dim, int block_size);
std::span<const int> AttendSm80HeadDims();
std::span<const int> AttendF32HeadDims();

}  // namespace prefilld::cuda
