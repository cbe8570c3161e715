// Programmatic dependent launch: a kernel that is launched so is set up while the one before it on
// the stream still runs, and waits in AwaitBefore until that one is done. Between short kernels a
// launch takes as long as the work. Devices before 9.0 launch as always.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace prefilld::cuda {

// The first thing that such a kernel does, in every thread: what was written before is there, and
// nobody reads any more what it will overwrite. Then whoever is launched so behind it may be set
// up, once all its blocks have come here.
__device__ __forceinline__ void AwaitBefore() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

inline bool CanOverlap() {
  static const bool can = [] {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major >= 9;
  }();
  return can;
}

// Only for kernels that begin with AwaitBefore.
template <typename... Parameters, typename... Args>
void LaunchOverlapped(void (*kernel)(Parameters...), dim3 grid, dim3 threads, cudaStream_t stream,
                      Args&&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = CanOverlap() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace prefilld::cuda
