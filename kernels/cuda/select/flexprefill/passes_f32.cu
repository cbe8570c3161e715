// FlexPrefill's two passes over K in F32, on the FP32 units: what row_sums.cu and lines.cu write.
// Queries are scaled and rounded to bf16 and so are logits, as everywhere; keys are not.
#include "kernels/cuda/fma_tile.cuh"
#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/select/flexprefill/tile.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kRows = 64;  // of the probe, in shared memory
constexpr int kOwnRows = kRows / kFmaSide;

// Up to 87 KB of shared memory.
template <int kGroups>
struct Plan {
  static constexpr int kKeys = kGroups <= 2 ? 64 : 16;  // of a step
  static constexpr int kColumns = kKeys / kFmaSide;
  static constexpr int kMassFloats = kKeys + 1;  // of a row
  static constexpr int TileBytes(int d) {
    return (kRows + kKeys) * RowFloats(d) * static_cast<int>(sizeof(float));
  }
  static constexpr int LinesBytes(int d) {
    return TileBytes(d) + kRows * kMassFloats * static_cast<int>(sizeof(float));
  }
};

// Rows [first, first + 64) of the probe of a head.
template <int kGroups>
__device__ __forceinline__ void LoadProbe(const Problem& p, const Sequence& s, int h, int first,
                                          float* to) {
  const QueryScale scale = ScaleOf(p.head_dim);
  LoadRows<kRows, kGroups>(
      to, p.head_dim,
      [&](int r) { return QueryRow<float>(p, s, h, s.sk - p.block_size + first + r); },
      [&](float x) { return ScaleQuery(x, scale); });
}

template <int kKeys, int kGroups>
__device__ __forceinline__ void LoadKeys(const Problem& p, const Sequence& s, int kv_head, int key,
                                         float* to) {
  LoadRows<kKeys, kGroups>(to, p.head_dim, [&](int r) {
    return key + r < s.sk ? KeyRow<float>(p, s, kv_head, key + r) : nullptr;
  });
}

// Rounded logits of a step; -infinity where row r, of position first + r, does not see the key.
template <int kColumns>
__device__ __forceinline__ void Logits(float (&c)[kOwnRows][kColumns], const float* queries,
                                       const float* keys, int d, int key, int first) {
  MultiplyRows(c, queries, keys, d);
  const int x = threadIdx.x % kFmaSide, y = threadIdx.x / kFmaSide;
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const bool seen = key + x + j * kFmaSide <= first + y + i * kFmaSide;
      c[i][j] = seen ? RoundToBFloat16(c[i][j]) : -kInfinity;
    }
  }
}

// The mean key of a block, a thread a channel, step by step of its keys.
class KeyMean {
 public:
  __device__ void Add(const float* keys, int steps, int d) {
    if (static_cast<int>(threadIdx.x) >= d) return;
    for (int t = 0; t < steps; ++t) sum_ += keys[t * RowFloats(d) + threadIdx.x];
  }
  __device__ void Write(float* to, int tokens, int d) {
    if (static_cast<int>(threadIdx.x) >= d) return;
    to[threadIdx.x] = sum_ / static_cast<float>(tokens);
    sum_ = 0;
  }

 private:
  float sum_ = 0;
};

// A thread block takes 64 rows of the probe of one head and a chunk of keys.
template <int kGroups>
__global__ void __launch_bounds__(kFmaThreads, 2) RowSumsKernel(FlexPrefill f) {
  using P = Plan<kGroups>;
  extern __shared__ __align__(16) float shared[];
  const Problem& p = f.problem;
  const Sequence s = p.sequence[blockIdx.z];
  const int B = p.block_size, d = p.head_dim;
  const int begin = blockIdx.x * f.chunk_blocks * B;
  if (f.IsShort(s) || begin >= s.sk) return;
  const int end = min(begin + f.chunk_blocks * B, s.sk);
  const int parts = B / kRows, h = blockIdx.y / parts, first = blockIdx.y % parts * kRows;
  const int group = p.q_heads / p.kv_heads, kv_head = h / group;
  const bool writes_means = h % group == 0 && first == 0;
  float* const queries = shared;
  float* const keys = queries + kRows * RowFloats(d);
  LoadProbe<kGroups>(p, s, h, first, queries);

  RunningSoftmax<kOwnRows> softmax;
  KeyMean mean;
  for (int key = begin; key < end; key += P::kKeys) {
    __syncthreads();  // nobody reads the step before any more
    LoadKeys<P::kKeys, kGroups>(p, s, kv_head, key, keys);
    __syncthreads();
    if (writes_means) {
      mean.Add(keys, P::kKeys, d);
      const int next = key + P::kKeys, block = key / B;
      if (next % B == 0 || next >= end) {
        mean.Write(f.key_mean + (kv_head * p.rows + s.row_begin + block) * d,
                   min(next, end) - block * B, d);
      }
    }
    float c[kOwnRows][P::kColumns];
    Logits(c, queries, keys, d, key, s.sk - B + first);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) softmax.Add(i, c[i], kLog2e);
  }
  const int64_t head = static_cast<int64_t>(blockIdx.z) * p.q_heads + h;
  float2* const out = f.row_sums + (head * f.chunks + blockIdx.x) * B + first;
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    const float sum = SideSum(softmax.sum[i]);
    if (threadIdx.x % kFmaSide == 0) {
      out[threadIdx.x / kFmaSide + i * kFmaSide] = {softmax.largest[i], sum};
    }
  }
}

// What one thread has of a block of keys: key `thread`, and diagonal `thread`, of which key k and
// row r lie on diagonal k + B - 1 - r.
struct Lines {
  float vertical = 0, diagonal = 0;

  // Adds masses of 64 rows from `row` on and kKeys keys from `key` on, both within their blocks,
  // rows in ascending order.
  template <int kKeys>
  __device__ __forceinline__ void Add(const float* mass, int row, int key, int block_size) {
    const int thread = threadIdx.x, k = thread - key;
    const int ahead = thread - (block_size - 1) + row - key;  // the key of this diagonal in row 0
    for (int r = 0; r < kRows; ++r) {
      const float* of_row = mass + r * (kKeys + 1);
      if (k >= 0 && k < kKeys) vertical += of_row[k];
      if (ahead + r >= 0 && ahead + r < kKeys) diagonal += of_row[ahead + r];
    }
  }
};

// A thread block takes one block of keys of one head. Every block is summed in the same order:
// equal scores stay equal, and ties fall to the lower index.
template <int kGroups>
__global__ void __launch_bounds__(kFmaThreads, 2) LinesKernel(FlexPrefill f) {
  using P = Plan<kGroups>;
  extern __shared__ __align__(16) float shared[];
  __shared__ RowConstants constants[128];
  __shared__ float warp_vertical[kFmaThreads / 32], warp_diagonal[kFmaThreads / 32];
  const Problem& p = f.problem;
  const Sequence s = p.sequence[blockIdx.z];
  const int block = blockIdx.x, h = blockIdx.y, B = p.block_size, d = p.head_dim;
  if (f.IsShort(s) || block >= s.k_blocks) return;
  const int kv_head = h / (p.q_heads / p.kv_heads);
  float* const queries = shared;
  float* const keys = queries + kRows * RowFloats(d);
  float* const mass = keys + P::kKeys * RowFloats(d);
  const int thread = threadIdx.x, x = thread % kFmaSide, y = thread / kFmaSide;
  if (thread < B) {
    constants[thread] = CombineRow(f, s, static_cast<int64_t>(blockIdx.z) * p.q_heads + h, thread);
  }

  Lines lines;
  for (int first = 0; first < B; first += kRows) {
    __syncthreads();  // nobody reads the rows before any more
    LoadProbe<kGroups>(p, s, h, first, queries);
    for (int key = 0; key < B; key += P::kKeys) {
      __syncthreads();  // nor the step before
      LoadKeys<P::kKeys, kGroups>(p, s, kv_head, block * B + key, keys);
      __syncthreads();
      float c[kOwnRows][P::kColumns];
      Logits(c, queries, keys, d, block * B + key, s.sk - B + first);
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        const int r = y + i * kFmaSide;
        const RowConstants constant = constants[first + r];
#pragma unroll
        for (int j = 0; j < P::kColumns; ++j) {
          // Not above 1, whatever rounding does to the exponent of an enormous logit.
          const float power = Exp2(fminf(fmaf(c[i][j], kLog2e, -constant.subtract), 0.0f));
          mass[r * P::kMassFloats + x + j * kFmaSide] =
              constant.weight == 0 ? 0 : power * constant.weight;  // a silent row may hold NaN
        }
      }
      __syncthreads();
      lines.Add<P::kKeys>(mass, first, key, B);
    }
  }

  const int64_t block_at = h * p.rows + s.row_begin + block;
  if (thread < B) {
    f.vertical[block_at * B + thread] = lines.vertical;
    f.diagonal[block_at * B + thread] = lines.diagonal;
  } else if (thread < 2 * B) {  // what the next block adds to its own
    f.diagonal_next[block_at * B + thread - B] = lines.diagonal;
  }
  const float vertical = WarpSum(lines.vertical), diagonal = WarpSum(lines.diagonal);
  if (thread % 32 == 0) {
    warp_vertical[thread / 32] = vertical;
    warp_diagonal[thread / 32] = diagonal;
  }
  __syncthreads();
  if (thread != 0) return;
  float sums[3] = {};
  for (int w = 0; w < B / 32; ++w) {
    sums[0] += warp_vertical[w];
    sums[1] += warp_diagonal[w];
    sums[2] += warp_diagonal[B / 32 + w];
  }
  f.block_vertical[block_at] = sums[0];
  f.block_diagonal[block_at] = sums[1];
  f.block_diagonal_next[block_at] = sums[2];
}

}  // namespace

cudaError_t FlexPrefillRowSumsF32(FlexPrefill* f, int multiprocessors, cudaStream_t stream) {
  const Problem& p = f->problem;
  const int lanes = p.q_heads * (p.block_size / kRows);
  const ChunkPlan plan = PlanChunks(p, 1, lanes, 2 * multiprocessors);
  f->chunk_blocks = plan.blocks;
  f->chunks = plan.chunks;
  return PlainTable::Launch(p.dtype, p.head_dim, [&]<int kGroups>() {
    const int bytes = Plan<kGroups>::TileBytes(p.head_dim);
    const cudaError_t error = cudaFuncSetAttribute(
        RowSumsKernel<kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    RowSumsKernel<kGroups>
        <<<dim3(plan.chunks, lanes, p.sequences), kFmaThreads, bytes, stream>>>(*f);
    return cudaGetLastError();
  });
}

cudaError_t FlexPrefillLinesF32(const FlexPrefill& f, cudaStream_t stream) {
  const Problem& p = f.problem;
  return PlainTable::Launch(p.dtype, p.head_dim, [&]<int kGroups>() {
    const int bytes = Plan<kGroups>::LinesBytes(p.head_dim);
    const cudaError_t error = cudaFuncSetAttribute(
        LinesKernel<kGroups>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    LinesKernel<kGroups>
        <<<dim3(p.k_blocks_max, p.q_heads, p.sequences), kFmaThreads, bytes, stream>>>(f);
    return cudaGetLastError();
  });
}

}  // namespace prefilld::cuda
