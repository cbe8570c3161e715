// What every kernel does to numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace prefilld::cuda {

// 2^x by the hardware: 2 ulp, 2^-infinity = 0, NaN stays.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Both rounded to T, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

// The two of Pack.
template <typename T>
__device__ __forceinline__ float2 Unpack(uint32_t both) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(both));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(both));
  }
}

// The same value in all lanes, known to the compiler as such.
__device__ __forceinline__ int Uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Over all lanes, in the same order always.
template <typename T>
__device__ __forceinline__ T WarpSum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Over the four lanes that share a row of a product.
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace prefilld::cuda
