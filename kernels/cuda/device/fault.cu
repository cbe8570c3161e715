// The injected fault.
#include "kernels/cuda/device/fault.h"

namespace prefilld::cuda {
namespace {

__global__ void WriteKernel(volatile int* at) { *at = 1; }

}  // namespace

cudaError_t WriteToNull(cudaStream_t stream) {
  WriteKernel<<<1, 1, 0, stream>>>(nullptr);
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
