// joint's repair in F32: as repair.cu, a row of blocks at a time, with means that are not rounded.
#include <algorithm>

#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/pages.cuh"
#include "kernels/cuda/select/joint/joint.cuh"
#include "kernels/cuda/select/joint/row.cuh"
#include "kernels/cuda/workspace.h"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerBlockMax = 4;  // pools of a block

// Scratch of one thread block.
struct Scratch {
  float* logits;    // [k_blocks * per_block][per_block] of pooled keys, then their exponentials
  uint32_t* row;    // [padded k_blocks] of the map
  uint32_t* words;  // the bitmap of the row's blocks
};
int64_t LayScratch(const Problem& problem, void* base, Scratch* scratch) {
  const int64_t n = std::max(1, problem.k_blocks_max), per_block = problem.block_size / kPool;
  Workspace parts(base);
  parts.Take(&scratch->logits, n * per_block * per_block);
  parts.Take(&scratch->row, (n + 127) / 128 * 128);
  parts.Take(&scratch->words, (n + 31) / 32);
  return parts.used();
}

struct Params {
  Problem problem;
  JointWork work;
  RowRules rules;
  Scratch scratch;  // of the first thread block
  float scale_log2;
  int64_t tasks;
};

// One value a warp, over the thread block. `partial` holds them; all threads get the result.
template <typename Join>
__device__ float JoinWarps(float x, float* partial, Join join) {
  for (int step = 16; step > 0; step /= 2) x = join(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads();  // nobody reads what was there
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
  for (int w = 1; w < kWarps; ++w) x = join(x, partial[w]);
  return x;
}

// The part of its sequence that pool `pool` of queries has.
struct PoolTokens {
  int begin, end;
};
__device__ __forceinline__ PoolTokens TokensOf(const Sequence& s, int pool) {
  const int from = pool * kPool - s.prefix;
  return {max(from, 0), min(from + kPool, s.sq)};
}

template <int kPerBlock>
struct Shared {
  float query[kPerBlock][PlainTable::kMax];  // means
  float partial[kWarps];
};

// Row I of the map of a head, to scratch.row [0, padded).
template <int kPerBlock>
__device__ void MapRow(const Params& params, const RowsOfHead& head, const float* pools, int I,
                       int padded, const Scratch& scratch, Shared<kPerBlock>* shared) {
  const Problem& p = params.problem;
  const Sequence& s = head.s;
  const int d = p.head_dim, first_pool = I * kPerBlock, keys = (I + 1) * kPerBlock;
  for (int at = threadIdx.x; at < kPerBlock * d; at += kThreads) {
    const int c = at % d;
    const PoolTokens tokens = TokensOf(s, first_pool + at / d);
    float sum = 0;
    for (int t = tokens.begin; t < tokens.end; ++t) sum += QueryRow<float>(p, s, head.h, t)[c];
    shared->query[at / d][c] =
        tokens.begin < tokens.end ? sum / static_cast<float>(tokens.end - tokens.begin) : 0;
  }
  __syncthreads();

  // A thread has every 256th pooled key.
  float largest[kPerBlock], sum[kPerBlock] = {};
#pragma unroll
  for (int x = 0; x < kPerBlock; ++x) largest[x] = -INFINITY;
  for (int key = threadIdx.x; key < keys; key += kThreads) {
    float dot[kPerBlock] = {};
    const float* pooled = pools + int64_t{key} * d;
#pragma unroll 2
    for (int c = 0; c < d; c += 4) {
      const float4 k = *reinterpret_cast<const float4*>(pooled + c);
#pragma unroll
      for (int x = 0; x < kPerBlock; ++x) {
        const float4 q = *reinterpret_cast<const float4*>(&shared->query[x][c]);
        dot[x] = fmaf(q.x, k.x, dot[x]);
        dot[x] = fmaf(q.y, k.y, dot[x]);
        dot[x] = fmaf(q.z, k.z, dot[x]);
        dot[x] = fmaf(q.w, k.w, dot[x]);
      }
    }
#pragma unroll
    for (int x = 0; x < kPerBlock; ++x) {
      const float logit = key <= first_pool + x ? dot[x] * params.scale_log2 : -INFINITY;
      largest[x] = fmaxf(largest[x], logit);
      scratch.logits[int64_t{key} * kPerBlock + x] = logit;
    }
  }
#pragma unroll
  for (int x = 0; x < kPerBlock; ++x) {
    largest[x] =
        JoinWarps(largest[x], shared->partial, [](float a, float b) { return fmaxf(a, b); });
    if (largest[x] == -INFINITY) largest[x] = 0;
  }
  for (int key = threadIdx.x; key < keys; key += kThreads) {
#pragma unroll
    for (int x = 0; x < kPerBlock; ++x) {
      float& logit = scratch.logits[int64_t{key} * kPerBlock + x];
      logit = exp2f(logit - largest[x]);
      sum[x] += logit;
    }
  }

  // The weight of every pooled row: 1 / (its sum * rows of the block). Rows without queries, and
  // rows that hold NaN or infinity, have none.
  float weight[kPerBlock];
  int rows = 0;
#pragma unroll
  for (int x = 0; x < kPerBlock; ++x) {
    const float all = JoinWarps(sum[x], shared->partial, [](float a, float b) { return a + b; });
    const PoolTokens tokens = TokensOf(s, first_pool + x);
    const bool counts = tokens.begin < tokens.end && isfinite(all) && all > 0;
    weight[x] = counts ? kMapRow / all : 0;
    rows += counts;
  }
  for (int J = threadIdx.x; J < padded; J += kThreads) {
    float mass = 0;
#pragma unroll
    for (int x = 0; x < kPerBlock; ++x) {
      if (weight[x] == 0 || J > I) continue;  // and then the exponentials may be anything
      float of_block = 0;
#pragma unroll
      for (int b = 0; b < kPerBlock; ++b) {
        of_block += scratch.logits[(int64_t{J} * kPerBlock + b) * kPerBlock + x];
      }
      mass += of_block * (weight[x] / static_cast<float>(rows));
    }
    scratch.row[J] = __float2uint_rn(mass);
  }
  __syncthreads();
}

// A thread block a row of blocks, from the last row of a head to its first; one warp completes it.
template <int kPerBlock>
__global__ void __launch_bounds__(kThreads, 2) RepairKernel(const __grid_constant__ Params params) {
  __shared__ __align__(16) Shared<kPerBlock> shared;
  const Problem& p = params.problem;
  const int64_t offset = blockIdx.x * params.work.scratch_stride;
  const auto own = [&](auto* part) {
    return reinterpret_cast<decltype(part)>(reinterpret_cast<char*>(part) + offset);
  };
  const Scratch scratch = {own(params.scratch.logits), own(params.scratch.row),
                           own(params.scratch.words)};
  for (int64_t task = blockIdx.x; task < params.tasks; task += gridDim.x) {
    const int64_t row = p.rows - 1 - task % p.rows;
    const int number = SequenceOfRow(p.sequence, p.sequences, row);
    RowsOfHead head = {};
    head.s = p.sequence[number];
    head.h = static_cast<int>(task / p.rows);
    head.lines = params.work.Lines(p, number, head.h);
    head.flags = *head.lines.flags;
    const int I = head.s.first_q_block + static_cast<int>(row - head.s.row_begin);
    const bool map = (head.flags & kNeedsRepair) != 0 || params.rules.most < head.s.k_blocks;
    const int padded = (I + 128) / 128 * 128;
    if (map) {
      const int64_t first_key_block = head.h / (p.q_heads / p.kv_heads) * params.work.slots +
                                      FirstBlock(head.s, number, p.block_size);
      const float* pools = reinterpret_cast<const float*>(params.work.pools) +
                           first_key_block * kPerBlock * p.head_dim;
      MapRow<kPerBlock>(params, head, pools, I, padded, scratch, &shared);
    }
    if (threadIdx.x < 32) {
      FinishRow(p, params.rules, head, I, map ? reinterpret_cast<int*>(scratch.row) : nullptr,
                padded, scratch.words);
    }
    __syncthreads();
  }
}

}  // namespace

size_t RepairF32ScratchBytes(const Problem& problem) {
  Scratch scratch = {};
  return static_cast<size_t>(LayScratch(problem, nullptr, &scratch));
}

cudaError_t RepairRowsF32(const Selection& selection, const JointWork& work, cudaStream_t stream) {
  const Problem& p = selection.problem;
  Params params = {.problem = p,
                   .work = work,
                   .rules = RulesOf(selection),
                   .scratch = {},
                   .scale_log2 = p.softmax_scale * 1.4426950408889634f,
                   .tasks = p.rows * p.q_heads};
  LayScratch(p, work.scratch, &params.scratch);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(work.scratch_blocks, params.tasks));
  if (p.block_size == kPerBlockMax * kPool) {
    RepairKernel<kPerBlockMax><<<grid, kThreads, 0, stream>>>(params);
  } else {
    RepairKernel<kPerBlockMax / 2><<<grid, kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
