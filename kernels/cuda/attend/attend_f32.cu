// Stage 3 in F32: block-sparse causal attention on the FP32 units, for parity with the CPU.
//
// A thread block has 64 queries of one head, in one row of blocks, and goes through the keys of its
// row: scores of a step of keys, their softmax relative to a running maximum, then, where the keys
// were, the values.
//
// Roofline at d = 128: a step of 64 keys is 1M multiply-adds, 8,200 cycles of the FP32 units of an
// SM; shared memory is busy for some 5,700 of them, and 64 KB come from L2.
#include <cmath>

#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/fma_tile.cuh"
#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/pages.cuh"
#include "kernels/cuda/select/block_index.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kRows = 64;
constexpr int kOwnRows = kRows / kFmaSide;

// Up to 88 KB of shared memory, which 8.6 has.
template <int kGroups>
struct Plan {
  static constexpr int kKeys = kGroups <= 2 ? 64 : 16;  // of a step
  static constexpr int kColumns = kKeys / kFmaSide;
  static constexpr int kWeightFloats = kKeys + 4;           // of a row
  static constexpr int kBlocksOfSm = kGroups <= 3 ? 2 : 1;  // which registers allow
  static constexpr int Bytes(int d) {
    return ((kRows + kKeys) * RowFloats(d) + kRows * kWeightFloats) *
           static_cast<int>(sizeof(float));
  }
};

struct Params {
  Problem problem;
  float scale_log2;  // softmax_scale / ln 2
};

// o += weights times values, of this thread's rows and of channels 64 g + 4 x and the next three.
template <int kGroups>
__device__ __forceinline__ void AddValues(float4 (&o)[kOwnRows][kGroups], const float* weights,
                                          const float* values, int d) {
  using P = Plan<kGroups>;
  const int x = threadIdx.x % kFmaSide, y = threadIdx.x / kFmaSide;
  int channel[kGroups];  // beyond the last: it is computed twice and written once
#pragma unroll
  for (int g = 0; g < kGroups; ++g) channel[g] = min(64 * g + 4 * x, d - 4);
#pragma unroll 1
  for (int k = 0; k < P::kKeys; k += 4) {
    float4 weight[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      weight[i] =
          *reinterpret_cast<const float4*>(weights + (y + i * kFmaSide) * P::kWeightFloats + k);
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float4 v =
            *reinterpret_cast<const float4*>(values + (k + t) * RowFloats(d) + channel[g]);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          const float w = t == 0   ? weight[i].x
                          : t == 1 ? weight[i].y
                          : t == 2 ? weight[i].z
                                   : weight[i].w;
          o[i][g].x = fmaf(w, v.x, o[i][g].x);
          o[i][g].y = fmaf(w, v.y, o[i][g].y);
          o[i][g].z = fmaf(w, v.z, o[i][g].z);
          o[i][g].w = fmaf(w, v.w, o[i][g].w);
        }
      }
    }
  }
}

template <int kGroups>
__global__ void __launch_bounds__(kFmaThreads, Plan<kGroups>::kBlocksOfSm)
    AttendKernel(const __grid_constant__ Params params) {
  using P = Plan<kGroups>;
  extern __shared__ __align__(16) float shared[];
  const Problem& p = params.problem;
  const int d = p.head_dim, h = blockIdx.y, kv_head = h / (p.q_heads / p.kv_heads);
  const int parts = p.block_size / kRows;
  const int64_t row = p.rows - 1 - blockIdx.x / parts;  // the longest of a sequence first
  const Sequence s = p.sequence[SequenceOfRow(p.sequence, p.sequences, row)];
  // Position of query 0 of the tile; those before the prefix's end and beyond the last are none.
  const int first = (s.first_q_block + static_cast<int>(row - s.row_begin)) * p.block_size +
                    static_cast<int>(blockIdx.x) % parts * kRows;
  const auto exists = [&](int r) { return first + r >= s.prefix && first + r < s.sk; };
  if (first >= s.sk || first + kRows <= s.prefix) return;

  float* const queries = shared;
  float* const keys = queries + kRows * RowFloats(d);  // and, in their place, values
  float* const weights = keys + P::kKeys * RowFloats(d);
  LoadRows<kRows, kGroups>(queries, d, [&](int r) {
    return exists(r) ? QueryRow<float>(p, s, h, first + r - s.prefix) : nullptr;
  });

  const int x = threadIdx.x % kFmaSide, y = threadIdx.x / kFmaSide;
  float4 o[kOwnRows][kGroups] = {};
  RunningSoftmax<kOwnRows> softmax;
  const int64_t task = h * p.rows + row;
  const uint16_t* index = p.index + task * p.index_stride;
  const int count = p.count[task];
  for (int at = 0; at < count; ++at) {
    const int begin = index[at] * p.block_size;
    const int end = min(begin + p.block_size, min(s.sk, first + kRows));
    for (int key = begin; key < end; key += P::kKeys) {
      __syncthreads();  // the values of the step before are read, and the queries are there
      LoadRows<P::kKeys, kGroups>(keys, d, [&](int r) {
        return key + r < s.sk ? KeyRow<float>(p, s, kv_head, key + r) : nullptr;
      });
      __syncthreads();
      float scores[kOwnRows][P::kColumns];
      MultiplyRows(scores, queries, keys, d);
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const int ahead = key + x - first - y - i * kFmaSide;  // of the query
#pragma unroll
        for (int j = 0; j < P::kColumns; ++j) {
          if (ahead + j * kFmaSide > 0) scores[i][j] = -INFINITY;
        }
        const float shrink = softmax.Add(i, scores[i], params.scale_log2);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          o[i][g].x *= shrink;
          o[i][g].y *= shrink;
          o[i][g].z *= shrink;
          o[i][g].w *= shrink;
        }
#pragma unroll
        for (int j = 0; j < P::kColumns; ++j) {
          weights[(y + i * kFmaSide) * P::kWeightFloats + x + j * kFmaSide] = scores[i][j];
        }
      }
      __syncthreads();  // the weights are there, and the keys are read
      LoadRows<P::kKeys, kGroups>(keys, d, [&](int r) {
        return key + r < s.sk ? ValueRow<float>(p, s, kv_head, key + r) : nullptr;
      });
      __syncthreads();
      AddValues<kGroups>(o, weights, keys, d);
    }
  }

#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    const float sum = SideSum(softmax.sum[i]);
    const int r = y + i * kFmaSide;
    if (!exists(r)) continue;
    const int64_t token = s.q_begin + first + r - s.prefix;
    const float by = sum == 0 ? 0.0f : 1 / sum;  // a row without a block
    float* const to =
        static_cast<float*>(p.o.data) + token * p.o.token_stride + h * p.o.head_stride;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (64 * g + 4 * x >= d) continue;
      const float4 v = o[i][g];
      *reinterpret_cast<float4*>(to + 64 * g + 4 * x) =
          make_float4(v.x * by, v.y * by, v.z * by, v.w * by);
    }
    if (p.lse != nullptr && x == 0) {
      p.lse[h * p.total_q + token] =
          sum == 0 ? -INFINITY : softmax.largest[i] * p.softmax_scale + logf(sum);
    }
  }
}

}  // namespace

std::span<const int> AttendF32HeadDims() { return PlainTable::kHeadDimList; }

bool HasAttendF32(DType dtype, int head_dim, int block_size) {
  return PlainTable::Has(dtype, head_dim) && block_size % kRows == 0;
}

cudaError_t AttendF32(const Problem& problem, void*, int, cudaStream_t stream) {
  if (!HasAttendF32(problem.dtype, problem.head_dim, problem.block_size)) {
    return cudaErrorInvalidValue;
  }
  if (problem.rows == 0) return cudaSuccess;
  const Params params = {.problem = problem,
                         .scale_log2 = problem.softmax_scale * 1.4426950408889634f};
  return PlainTable::Launch(problem.dtype, problem.head_dim, [&]<int kGroups>() {
    const int bytes = Plan<kGroups>::Bytes(problem.head_dim);
    const cudaError_t error = cudaFuncSetAttribute(
        AttendKernel<kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(problem.rows * (problem.block_size / kRows)),
                    problem.q_heads);
    AttendKernel<kGroups><<<grid, kFmaThreads, bytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace prefilld::cuda
