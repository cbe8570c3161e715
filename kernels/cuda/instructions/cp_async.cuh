// Ampere's asynchronous copies to shared memory, each as PTX has it. `to` is a shared address.
#pragma once

#include <cstdint>

#include "kernels/cuda/instructions/shared_memory.cuh"

namespace prefilld::cuda {

// 16 bytes; zeros where !exists, and then `from` is not read.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
// The same, and L2 gets the 128 bytes around them.
__device__ __forceinline__ void CopyAsyncOfLine(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncOfLine(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
__device__ __forceinline__ void CopyAsync4(const void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups that this thread has committed, and for all of its copies.
__device__ __forceinline__ void CopyAsyncWaitGroups() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ void CopyAsyncWaitAll() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
// The barrier, which counts on it, hears of this thread's copies so far when they are done.
__device__ __forceinline__ void CopyAsyncArrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

}  // namespace prefilld::cuda
