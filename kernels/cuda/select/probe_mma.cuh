// What selection multiplies with: rows of channels in shared memory, cp.async that brings them
// there, and their products with wgmma on sm_90a, with ldmatrix and mma.sync elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/instructions/hopper.cuh"

namespace prefilld::cuda {

// Rows of 16-bit channels in shared memory as wgmma and ldmatrix both read them: 64 channels of all
// rows, then the next 64, each row of 128 bytes with its chunks of 16 swizzled by the row. At d =
// 96 the last 32 channels are zeros. The tile begins at a multiple of 1024 bytes.
template <int kChannels, int kRows>
struct RowTile {
  static constexpr int kPadded = (kChannels + 63) / 64 * 64;
  static constexpr int kChunks = kPadded / 8;  // of a row; the first kChannels / 8 hold channels
  static constexpr int kHalfBytes = kRows * 128;
  static constexpr int kBytes = kRows * kPadded * 2;
  static __device__ __forceinline__ int Offset(int row, int chunk) {
    return chunk / 8 * kHalfBytes + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
  }
};

__device__ __forceinline__ uint32_t SharedOffset(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory; zeros where !exists, and then `from` is not read.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all of this thread's; a barrier then makes them everybody's, wgmma's reads too.
__device__ __forceinline__ void CopyAsyncWaitAll() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  FenceAsyncProxy();
#endif
}

// Four 8 x 8 matrices; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void LoadMatrices(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at));
}

// c[16 x 8] += a[16 x 16] b[16 x 8].
template <typename T>
__device__ __forceinline__ void Multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// c[64 x 64] (+)= A B^T over 16 channels, both RowTiles; a warp has 16 rows of c.
template <typename T>
__device__ __forceinline__ void Wgmma64x64(float (&c)[8][4], uint64_t a, uint64_t b,
                                           bool accumulate) {
#define PREFILLD_C(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define PREFILLD_WGMMA(TYPE)                                                                      \
  asm volatile(                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "   \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, "  \
      "0;\n}\n"                                                                                   \
      : PREFILLD_C(0), PREFILLD_C(1), PREFILLD_C(2), PREFILLD_C(3), PREFILLD_C(4), PREFILLD_C(5), \
        PREFILLD_C(6), PREFILLD_C(7)                                                              \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PREFILLD_WGMMA("bf16");
  } else {
    PREFILLD_WGMMA("f16");
  }
#undef PREFILLD_WGMMA
#undef PREFILLD_C
}
// Of a RowTile, 1024 bytes from one group of eight rows to the next; `low` is LowDescriptor() of
// its begin plus a sixteenth of an offset in bytes. The upper half is a constant.
__device__ __forceinline__ uint32_t LowDescriptor(uint32_t at) {
  return (at & 0x3ffff) >> 4 | 1u << 16;
}
__device__ __forceinline__ uint64_t Descriptor(uint32_t low) {
  return (uint64_t{1024 >> 4 | 1u << 30} << 32) | low;
}
// The same value in all lanes, known to the compiler as such.
__device__ __forceinline__ int Uniform(int x) { return __shfl_sync(~0u, x, 0); }

// True where four warps multiply together, with wgmma.
template <int kChannels>
__device__ constexpr bool MultipliesByWarpgroup() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return kChannels <= 128;
#else
  return false;
#endif
}

// c[u] = rows [row[u], row[u] + 16) of `a` against kKeys keys from key_row on, for u below kUnits.
// Lane l of a warp gets columns 8 j + l % 4 * 2 and the next, of row l / 4 in c[u][j][0..1] and of
// row 8 + l / 4 in c[u][j][2..3]. Where warpgroups multiply, four warps call it together: warp w of
// them has row[u] = 64 * tile[u] + 16 * w, kKeys is 64, and tile and key_row are Uniform().
template <typename T, int kChannels, int kRows, int kKeyRows, int kUnits, int kKeys>
__device__ __forceinline__ void RowsTimesKeys(float (&c)[2][kKeys / 8][4], uint32_t a,
                                              const int (&row)[2], const int (&tile)[2],
                                              uint32_t keys, int key_row) {
  using Rows = RowTile<kChannels, kRows>;
  using Keys = RowTile<kChannels, kKeyRows>;
  if constexpr (MultipliesByWarpgroup<kChannels>()) {
    const uint32_t of_keys = LowDescriptor(keys) + key_row * 8;
    WgmmaFence();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint32_t of_rows = LowDescriptor(a) + tile[u] * (64 * 8);
#pragma unroll
      for (int k = 0; k < Rows::kPadded / 16; ++k) {
        Wgmma64x64<T>(c[u], Descriptor(of_rows + (k / 4 * Rows::kHalfBytes + k % 4 * 32) / 16),
                      Descriptor(of_keys + (k / 4 * Keys::kHalfBytes + k % 4 * 32) / 16), k > 0);
      }
    }
    WgmmaCommit();
    WgmmaWait<0>();
  } else {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        c[u][j][0] = c[u][j][1] = c[u][j][2] = c[u][j][3] = 0;
      }
    }
#pragma unroll 4
    for (int k = 0; k < Rows::kPadded / 16; ++k) {
      uint32_t rows[2][4];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        LoadMatrices(rows[u], a + Rows::Offset(row[u] + lane % 16, 2 * k + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; j += 2) {
        uint32_t b[4];
        LoadMatrices(b, keys + Keys::Offset(key_row + 8 * j + lane % 8 + lane / 16 * 8,
                                            2 * k + lane / 8 % 2));
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          Multiply<T>(c[u][j], rows[u], b[0], b[1]);
          Multiply<T>(c[u][j + 1], rows[u], b[2], b[3]);
        }
      }
    }
  }
}

// Over the four lanes that share a row of c.
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace prefilld::cuda
