// Hopper's asynchronous instructions, each as PTX has it: mbarrier, TMA, wgmma.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace prefilld::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarrier: a phase ends when all arrivals and all announced bytes are in --------------------
__device__ __forceinline__ void BarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals));
}
__device__ __forceinline__ void BarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
__device__ __forceinline__ void BarrierArriveExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// ---- named barriers of a part of the block -----------------------------------------------------
__device__ __forceinline__ void NamedSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void NamedArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- TMA ---------------------------------------------------------------------------------------
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
// Four 8 x 8 matrices of 16-bit elements, one register of a fragment each; lane 8 i + r says where
// row r of matrix i goes.
__device__ __forceinline__ void StoreMatrices(void* to, uint32_t a, uint32_t b, uint32_t c,
                                              uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(SharedAddress(to)),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}
// Orders ordinary stores to shared memory before the reads of wgmma and TMA.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma -------------------------------------------------------------------------------------
// A matrix in shared memory in 128-byte swizzled rows. Groups of 8 rows, or of 8 along K of an
// MN-major operand, follow each other; `leading` bytes lie between groups of 64 elements along MN.
// Made by whole warps.
class Matrix {
 public:
  // The reduction, of what all lanes have, puts it where wgmma wants it, in a uniform register:
  // otherwise each of its instructions would wait for four moves there.
  __device__ __forceinline__ Matrix(const void* at, uint32_t leading)
      : low_(__reduce_or_sync(~0u, (SharedAddress(at) & 0x3ffff) >> 4 | (leading >> 4) << 16)) {}
  // Of the same matrix `bytes` further on.
  __device__ __forceinline__ uint64_t Descriptor(uint32_t bytes) const {
    return uint64_t{1u << 30 | kStride >> 4} << 32 | (low_ + (bytes >> 4));
  }

 private:
  static constexpr uint32_t kStride = 1024;
  uint32_t low_;
};
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define PREFILLD_C4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define PREFILLD_C16(c, i) \
  PREFILLD_C4(c, i), PREFILLD_C4(c, i + 4), PREFILLD_C4(c, i + 8), PREFILLD_C4(c, i + 12)
#define PREFILLD_C32(c) PREFILLD_C16(c, 0), PREFILLD_C16(c, 16)
#define PREFILLD_C64(c) PREFILLD_C32(c), PREFILLD_C16(c, 32), PREFILLD_C16(c, 48)
#define PREFILLD_R32                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PREFILLD_R64                                                                             \
  PREFILLD_R32                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c[64 x 128] (+)= A B^T over 16 channels: A and B in shared memory, K-major.
template <typename T>
__device__ __forceinline__ void WgmmaQk(float (&c)[64], uint64_t a, uint64_t b, bool accumulate) {
#define PREFILLD_QK(TYPE)                                                            \
  asm volatile(                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" PREFILLD_R64 \
      "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                                             \
      : PREFILLD_C64(c)                                                              \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PREFILLD_QK("bf16");
  } else {
    PREFILLD_QK("f16");
  }
#undef PREFILLD_QK
}

// c[64 x N] (+)= A B over 16 keys: A in registers, B in shared memory, MN-major. N is 128 or 64.
template <typename T>
__device__ __forceinline__ void WgmmaPv(float (&c)[64], const uint32_t (&a)[4], uint64_t b,
                                        bool accumulate) {
#define PREFILLD_PV(TYPE)                                                            \
  asm volatile(                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" PREFILLD_R64 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"                               \
      : PREFILLD_C64(c)                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PREFILLD_PV("bf16");
  } else {
    PREFILLD_PV("f16");
  }
#undef PREFILLD_PV
}
template <typename T>
__device__ __forceinline__ void WgmmaPv(float (&c)[32], const uint32_t (&a)[4], uint64_t b,
                                        bool accumulate) {
#define PREFILLD_PV(TYPE)                                                           \
  asm volatile(                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" PREFILLD_R32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"                              \
      : PREFILLD_C32(c)                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PREFILLD_PV("bf16");
  } else {
    PREFILLD_PV("f16");
  }
#undef PREFILLD_PV
}

#undef PREFILLD_C4
#undef PREFILLD_C16
#undef PREFILLD_C32
#undef PREFILLD_C64
#undef PREFILLD_R32
#undef PREFILLD_R64

}  // namespace prefilld::cuda
