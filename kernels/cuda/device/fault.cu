// The injected faults.
#include "kernels/cuda/device/fault.h"

namespace prefilld::cuda {
namespace {

__global__ void WriteKernel(volatile int* at) { *at = 1; }

__global__ void EndlessKernel() {
  for (;;) __nanosleep(1000000);
}

}  // namespace

cudaError_t NeverEnd(cudaStream_t stream) {
  EndlessKernel<<<1, 1, 0, stream>>>();
  return cudaGetLastError();
}

cudaError_t WriteToNull(cudaStream_t stream) {
  WriteKernel<<<1, 1, 0, stream>>>(nullptr);
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
