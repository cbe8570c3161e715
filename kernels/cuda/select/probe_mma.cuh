// What selection multiplies with: rows of channels in shared memory, cp.async that brings them
// there, and their products with wgmma on sm_90a, with ldmatrix and mma.sync elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/instructions/cp_async.cuh"
#include "kernels/cuda/instructions/mma.cuh"
#include "kernels/cuda/instructions/wgmma.cuh"

namespace prefilld::cuda {

// Waits for all of this thread's copies; a barrier then makes them everybody's, wgmma's reads too.
__device__ __forceinline__ void WaitForRows() {
  CopyAsyncWaitGroups();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  FenceAsyncProxy();
#endif
}

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
    const Matrix of_keys = Matrix::AtUniform(keys).FromRow(key_row);
    WgmmaFence();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const Matrix of_rows = Matrix::AtUniform(a).FromRow(64 * tile[u]);
#pragma unroll
      for (int k = 0; k < Rows::kPadded / 16; ++k) {
        WgmmaQk<T>(reinterpret_cast<float(&)[32]>(c[u]),
                   of_rows.Descriptor(k / 4 * Rows::kHalfBytes + k % 4 * 32),
                   of_keys.Descriptor(k / 4 * Keys::kHalfBytes + k % 4 * 32), k > 0);
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
          Mma<T>(c[u][j], rows[u], b[0], b[1]);
          Mma<T>(c[u][j + 1], rows[u], b[2], b[3]);
        }
      }
    }
  }
}

}  // namespace prefilld::cuda
