// Hopper's products of a warpgroup, each as PTX has it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/instructions/shared_memory.cuh"

namespace prefilld::cuda {

// A matrix in shared memory in 128-byte swizzled rows. Groups of 8 rows, or of 8 along K of an
// MN-major operand, follow each other; `leading` bytes lie between groups of 64 elements along MN.
// Made by whole warps.
class Matrix {
 public:
  // The reduction, of what all lanes have, puts it where wgmma wants it, in a uniform register:
  // otherwise each of its instructions would wait for four moves there.
  __device__ __forceinline__ Matrix(const void* at, uint32_t leading)
      : low_(__reduce_or_sync(~0u, (SharedAddress(at) & 0x3ffff) >> 4 | (leading >> 4) << 16)) {}
  // Of a shared address that is the same in all lanes and known to the compiler as such, in groups
  // of 64 elements along K.
  static __device__ __forceinline__ Matrix AtUniform(uint32_t at) {
    return Matrix((at & 0x3ffff) >> 4 | 1u << 16);
  }
  // The same matrix from this row on, a multiple of 8.
  __device__ __forceinline__ Matrix FromRow(int row) const { return Matrix(low_ + row * 8); }
  // Of the same matrix `bytes` further on.
  __device__ __forceinline__ uint64_t Descriptor(uint32_t bytes) const {
    return uint64_t{1u << 30 | kStride >> 4} << 32 | (low_ + (bytes >> 4));
  }

 private:
  explicit __device__ __forceinline__ Matrix(uint32_t low) : low_(low) {}
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

// c[64 x N] (+)= A B^T over 16 channels: A and B in shared memory, K-major. N is 128 or 64.
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

template <typename T>
__device__ __forceinline__ void WgmmaQk(float (&c)[32], uint64_t a, uint64_t b, bool accumulate) {
#define PREFILLD_QK(TYPE)                                                           \
  asm volatile(                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" PREFILLD_R32 \
      "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                            \
      : PREFILLD_C32(c)                                                             \
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
