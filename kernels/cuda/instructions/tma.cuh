// Hopper's copies of boxes of a tensor, each as PTX has it.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/instructions/shared_memory.cuh"

namespace prefilld::cuda {

// A box at (c0, c1, c2), innermost first, to shared memory. Coordinates outside give zeros.
__device__ __forceinline__ void TmaLoad(const CUtensorMap* map, void* to, uint64_t* barrier, int c0,
                                        int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5}], [%2];" ::"r"(SharedAddress(to)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void TmaPrefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The other way; what lies outside is not written. Then commit; wait before the memory is used
// again.
__device__ __forceinline__ void TmaStore(const CUtensorMap* map, const void* from, int c0, int c1,
                                         int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(SharedAddress(from)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void TmaStoreCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void TmaStoreWait() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace prefilld::cuda
