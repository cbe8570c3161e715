// The matrix instructions of every chip from 8.0 on, each as PTX has it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/instructions/shared_memory.cuh"

namespace prefilld::cuda {

// Four 8 x 8 matrices of 16-bit elements: row r of the first at the address of lane r, of the
// second at that of lane 8 + r, ...
__device__ __forceinline__ void LoadMatrices(uint32_t (&x)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void LoadTransposed(uint32_t (&x)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}
// The other way, from 9.0 on: four 8 x 8 matrices, one register of a fragment each; lane 8 i + r
// says where row r of matrix i goes.
__device__ __forceinline__ void StoreMatrices(void* to, uint32_t a, uint32_t b, uint32_t c,
                                              uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(SharedAddress(to)),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// c[16 x 8] += a[16 x 16] b[16 x 8]; c has four elements a thread.
template <typename T>
__device__ __forceinline__ void Mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define PREFILLD_MMA(TYPE)                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PREFILLD_MMA("bf16");
  } else {
    PREFILLD_MMA("f16");
  }
#undef PREFILLD_MMA
}

}  // namespace prefilld::cuda
