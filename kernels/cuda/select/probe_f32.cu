// The probe in F32: exact block mass of 64 rows per head on the FP32 units, and the pools of keys.
#include <algorithm>

#include "kernels/cuda/fma_tile.cuh"
#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/pages.cuh"
#include "kernels/cuda/select/probe.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kOwnRows = kProbeRows / kFmaSide;

// Up to 98 KB of shared memory.
template <int kGroups>
struct Plan {
  static constexpr int kKeys = kGroups <= 2 ? 64 : 32;  // of a step: one or two pools
  static constexpr int Bytes(int d) {
    return (kProbeRows + kKeys) * RowFloats(d) * static_cast<int>(sizeof(float));
  }
};

struct Params {
  Problem problem;
  RowRule rule;
  float scale_log2;  // softmax_scale / ln 2
  int64_t slots;
  BlockPart* parts;
  float* pools;  // or null
};

// The means of the pools of a step, a thread a channel at a time; tokens beyond `valid` are zeros.
template <int kKeys>
__device__ void PoolKeys(const float* keys, int d, int valid, float* out) {
  for (int x = threadIdx.x; x < kKeys / kPool * d; x += kFmaThreads) {
    const int pool = x / d, c = x % d;
    float sum = 0;
#pragma unroll 8
    for (int t = 0; t < kPool; ++t) sum += keys[(pool * kPool + t) * RowFloats(d) + c];
    const int tokens = min(kPool, valid - pool * kPool);
    out[x] = tokens > 0 ? sum / static_cast<float>(tokens) : 0;
  }
}

// A thread block takes one query head of one sequence and every gridDim.x-th block of keys. Its
// rows stay in shared memory, steps of keys pass through. Reads K once a query head.
template <int kGroups>
__global__ void __launch_bounds__(kFmaThreads, 2)
    ProbeKernel(const __grid_constant__ Params params) {
  using P = Plan<kGroups>;
  extern __shared__ __align__(16) float shared[];
  const Problem& p = params.problem;
  const Sequence s = p.sequence[blockIdx.z];
  const int n = s.k_blocks, rows = ProbeRowCount(s), d = p.head_dim, h = blockIdx.y;
  if (rows == 0 || static_cast<int>(blockIdx.x) >= n) return;
  const int group = p.q_heads / p.kv_heads, kv_head = h / group;
  float* const queries = shared;
  float* const keys = queries + kProbeRows * RowFloats(d);
  LoadRows<kProbeRows, kGroups>(queries, d, [&](int r) {
    return r < rows ? QueryRow<float>(p, s, h, ProbeRow(params.rule, r, s.sq)) : nullptr;
  });

  const int x = threadIdx.x % kFmaSide, y = threadIdx.x / kFmaSide;
  int position[kOwnRows];  // of the queries of this thread, -1 for none
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    const int r = y + i * kFmaSide;
    position[i] = r < rows ? s.prefix + ProbeRow(params.rule, r, s.sq) : -1;
  }
  const int64_t first_slot = FirstBlock(s, blockIdx.z, p.block_size);
  for (int J = blockIdx.x; J < n; J += gridDim.x) {
    RunningSoftmax<kOwnRows> softmax;
    for (int in_block = 0; in_block < p.block_size; in_block += P::kKeys) {
      const int key = J * p.block_size + in_block;
      __syncthreads();  // nobody reads the step before any more
      LoadRows<P::kKeys, kGroups>(keys, d, [&](int r) {
        return key + r < s.sk ? KeyRow<float>(p, s, kv_head, key + r) : nullptr;
      });
      __syncthreads();
      if (params.pools != nullptr && h % group == 0) {
        const int64_t pool =
            ((kv_head * params.slots + first_slot + J) * p.block_size + in_block) / kPool;
        PoolKeys<P::kKeys>(keys, d, s.sk - key, params.pools + pool * d);
      }
      float logits[kOwnRows][P::kKeys / kFmaSide];
      MultiplyRows(logits, queries, keys, d);
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
        for (int j = 0; j < P::kKeys / kFmaSide; ++j) {
          if (key + x + j * kFmaSide > position[i]) logits[i][j] = -INFINITY;
        }
        softmax.Add(i, logits[i], params.scale_log2);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int64_t r = y + i * kFmaSide;
      const float sum = SideSum(softmax.sum[i]);
      if (x == 0 && position[i] >= J * p.block_size) {
        params.parts[(int64_t{h} * kProbeRows + r) * params.slots + first_slot + J] = {
            softmax.largest[i] * params.scale_log2, sum};
      }
    }
  }
}

}  // namespace

cudaError_t ProbeF32(const Problem& problem, RowRule rule, BlockPart* parts, void* pools,
                     int multiprocessors, cudaStream_t stream) {
  const Params params = {.problem = problem,
                         .rule = rule,
                         .scale_log2 = problem.softmax_scale * 1.4426950408889634f,
                         .slots = BlockSlots(problem),
                         .parts = parts,
                         .pools = static_cast<float*>(pools)};
  const int64_t others = int64_t{problem.q_heads} * problem.sequences;
  const int64_t share = (4 * multiprocessors + others - 1) / others;
  const dim3 grid(
      static_cast<unsigned>(std::clamp<int64_t>(share, 1, std::max(1, problem.k_blocks_max))),
      problem.q_heads, problem.sequences);
  return PlainTable::Launch(problem.dtype, problem.head_dim, [&]<int kGroups>() {
    const int bytes = Plan<kGroups>::Bytes(problem.head_dim);
    const cudaError_t error = cudaFuncSetAttribute(
        ProbeKernel<kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    ProbeKernel<kGroups><<<grid, kFmaThreads, bytes, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace prefilld::cuda
