// Rows of F32 in shared memory and their products on the FP32 units, true F32 throughout: what the
// kernels for F32 multiply with. A thread block of 256 threads is 16 by 16 of them, x = thread % 16
// and y = thread / 16, and each has every 16th row of both sides.
#pragma once

#include <cuda_runtime_api.h>

namespace prefilld::cuda {

constexpr int kFmaThreads = 256;
constexpr int kFmaSide = 16;

// Floats from a row to the next. With four more than a multiple of 8, eight neighbouring rows are
// read from different banks, 16 bytes each.
__host__ __device__ constexpr int RowFloats(int channels) { return channels + 4; }

// Row r < kRows is `channels` floats from row_of(r), each through `change`, or zeros where that is
// null. The caller synchronises before and after.
template <int kRows, int kGroups, typename RowOf, typename Change>
__device__ __forceinline__ void LoadRows(float* to, int channels, RowOf row_of, Change change) {
  constexpr int kOwn = kRows / kFmaSide;
  constexpr int kAtOnce = kOwn * kGroups <= 8 ? kOwn : kGroups <= 2 ? 4 : 2;  // loads in flight
  static_assert(kRows % kFmaSide == 0 && kOwn % kAtOnce == 0);
  const int x = threadIdx.x % kFmaSide, y = threadIdx.x / kFmaSide;
#pragma unroll
  for (int first = 0; first < kOwn; first += kAtOnce) {
    float4 held[kAtOnce][kGroups] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float* from = row_of(y + (first + i) * kFmaSide);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int c = 64 * g + 4 * x;
        if (from != nullptr && c < channels) {
          held[i][g] = *reinterpret_cast<const float4*>(from + c);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int c = 64 * g + 4 * x;
        if (c >= channels) continue;
        const float4 v = held[i][g];
        *reinterpret_cast<float4*>(to + (y + (first + i) * kFmaSide) * RowFloats(channels) + c) =
            make_float4(change(v.x), change(v.y), change(v.z), change(v.w));
      }
    }
  }
}
template <int kRows, int kGroups, typename RowOf>
__device__ __forceinline__ void LoadRows(float* to, int channels, RowOf row_of) {
  LoadRows<kRows, kGroups>(to, channels, row_of, [](float x) { return x; });
}

// c[i][j] = row y + 16 i of a times row x + 16 j of b, summed in the order of channels.
template <int kA, int kB>
__device__ __forceinline__ void MultiplyRows(float (&c)[kA][kB], const float* a, const float* b,
                                             int channels) {
  const int stride = RowFloats(channels);
  a += threadIdx.x / kFmaSide * stride;
  b += threadIdx.x % kFmaSide * stride;
#pragma unroll
  for (int i = 0; i < kA; ++i) {
#pragma unroll
    for (int j = 0; j < kB; ++j) c[i][j] = 0;
  }
#pragma unroll 1
  for (int k = 0; k < channels; k += 4) {
    float4 u[kA], v[kB];
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      u[i] = *reinterpret_cast<const float4*>(a + i * kFmaSide * stride + k);
    }
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      v[j] = *reinterpret_cast<const float4*>(b + j * kFmaSide * stride + k);
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int j = 0; j < kB; ++j) {
        c[i][j] = fmaf(u[i].x, v[j].x, c[i][j]);
        c[i][j] = fmaf(u[i].y, v[j].y, c[i][j]);
        c[i][j] = fmaf(u[i].z, v[j].z, c[i][j]);
        c[i][j] = fmaf(u[i].w, v[j].w, c[i][j]);
      }
    }
  }
}

// Over the sixteen lanes that share y.
__device__ __forceinline__ float SideMax(float value) {
#pragma unroll
  for (int step = kFmaSide / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  }
  return value;
}
__device__ __forceinline__ float SideSum(float value) {
#pragma unroll
  for (int step = kFmaSide / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(~0u, value, step);
  }
  return value;
}

// Largest scores and sums of 2^((score - largest) * unit), over any number of tiles: of the rows
// that a thread has, sums of its own columns alone.
template <int kRows>
struct RunningSoftmax {
  float largest[kRows], sum[kRows];

  __device__ __forceinline__ RunningSoftmax() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      largest[i] = -INFINITY;
      sum[i] = 0;
    }
  }
  // Adds scores of row i and makes them these powers. Returns what everything of the row that was
  // before is to be multiplied by.
  template <int kColumns>
  __device__ __forceinline__ float Add(int i, float (&scores)[kColumns], float unit) {
    float top = scores[0];
#pragma unroll
    for (int j = 1; j < kColumns; ++j) top = fmaxf(top, scores[j]);
    top = fmaxf(largest[i], SideMax(top));
    const float base = top == -INFINITY ? 0.0f : top;
    const float shrink = exp2f((largest[i] - base) * unit);
    largest[i] = top;
    sum[i] *= shrink;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      scores[j] = exp2f((scores[j] - base) * unit);
      sum[i] += scores[j];
    }
    return shrink;
  }
};

}  // namespace prefilld::cuda
