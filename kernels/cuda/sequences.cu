// Sequences travel to the device as kernel arguments: a copy would need host memory that stays.
#include <algorithm>

#include "kernels/cuda/instructions/overlap.cuh"
#include "kernels/cuda/launch.h"

namespace prefilld::cuda {
namespace {

constexpr int kSequencesPerLaunch = 64;  // 2.5 KB of the 4 KB that arguments may take everywhere

struct Batch {
  Sequence sequence[kSequencesPerLaunch];
};

__global__ void WriteKernel(const __grid_constant__ Batch batch, int count, Sequence* device) {
  AwaitBefore();
  if (threadIdx.x < count) device[threadIdx.x] = batch.sequence[threadIdx.x];
}

}  // namespace

cudaError_t WriteSequences(const Sequence* host, int count, Sequence* device, cudaStream_t stream) {
  for (int begin = 0; begin < count; begin += kSequencesPerLaunch) {
    Batch batch = {};
    const int part = std::min(kSequencesPerLaunch, count - begin);
    std::copy(host + begin, host + begin + part, batch.sequence);
    LaunchOverlapped(WriteKernel, 1, kSequencesPerLaunch, stream, batch, part, device + begin);
  }
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
