// joint, the repair: rows of blocks whose lines hold less than gamma of a pooled map get the blocks
// with the largest pooled mass. Writes the block index.
#include <algorithm>
#include <cfloat>

#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/select/joint/joint.cuh"
#include "kernels/cuda/select/joint/row.cuh"
#include "kernels/cuda/select/probe_mma.cuh"
#include "kernels/cuda/workspace.h"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTiles = kRepairRows / 32;  // of 32 pooled queries, one a warp and step
constexpr int kCells = kRepairRows / 4;   // of four pooled queries that one lane holds
// Rows of up to this many blocks are searched in shared memory (8 KB a warp), longer ones in
// scratch.
constexpr int kBlocksInShared = 2048;

// After the map the same memory holds for each warp its row of the map and the bitmap of its
// blocks; of a longer row the bitmap alone, in the same bytes. The stride of 4 words more than a
// multiple of 32 banks lets eight rows be written at once.
constexpr int kSearchStride = 4 * (kBlocksInShared + kBlocksInShared / 32 + 4);
static_assert(kSearchStride >= kKeyBlocksMax / 8 && kSearchStride / 4 % 32 == 4);

// 96 KB of shared memory: two thread blocks an SM on sm_90, one on sm_86.
template <int kChannels>
struct Layout {
  static constexpr int kKeys = kChannels <= 128 ? 128 : 32;  // pooled keys of a step
  static constexpr int kChunk = kKeys / 2;                   // of a warp
  using Rows = RowTile<kChannels, kRepairRows>;
  using Keys = RowTile<kChannels, kKeys>;
  static constexpr int kQ = 0;
  static constexpr int kK = Rows::kBytes;
  static constexpr int kBytes = std::max(kK + 2 * Keys::kBytes, kWarps* kSearchStride);
};
constexpr int ChunkOf(int head_dim) { return head_dim <= 128 ? 64 : 16; }

// Scratch of one thread block:
//   cells [k_blocks][kCells] float4: sums of 2^(logit - base) over a block of keys, four rows
//   bases [chunks][kCells] float4: the base of those rows in a chunk of pooled keys
//   rows [kWarps][padded k_blocks] uint32, where k_blocks > kBlocksInShared
__host__ __device__ inline int64_t Padded(int64_t n) { return (n + 127) / 128 * 128; }
__host__ __device__ inline int64_t CellBytes(
    int64_t n) {  // a chunk may reach beyond the last block
  return (n + 31) / 32 * 32 * kCells * 16;
}
__host__ __device__ inline int64_t BaseBytes(int64_t n, int per_block, int chunk) {
  return (n * per_block + chunk - 1) / chunk * kCells * 16;
}

struct Params {
  Problem problem;
  JointWork work;
  RowRules rules;
  float scale_log2;
  int32_t tiles_max;  // tasks of a head of the longest sequence
  int32_t tasks;
  int32_t blocks_of_task;  // query blocks
};

// What a thread block knows of its task: query blocks [first, end) of one head, absolute.
struct Task : RowsOfHead {  // of head -1: there are no more tasks
  int first, end;
  int64_t first_key_block;  // of the pools
};

// By one thread. The last rows of all heads lie at the front.
__device__ Task NextTask(const Params& params, bool from_back) {
  const Problem& p = params.problem;
  const unsigned long long taken = atomicAdd(params.work.taken, from_back ? 1ull << 32 : 1ull);
  const int front = static_cast<int>(taken), back = static_cast<int>(taken >> 32);
  Task task = {};
  task.h = -1;
  if (front + back >= params.tasks) return task;
  const int id = from_back ? params.tasks - 1 - back : front;
  task.h = id % p.q_heads;
  const int number = id / p.q_heads % p.sequences;
  const int tile = params.tiles_max - 1 - id / p.q_heads / p.sequences;
  task.s = p.sequence[number];
  task.first = task.s.first_q_block + tile * params.blocks_of_task;
  task.end = min(task.first + params.blocks_of_task, task.s.first_q_block + task.s.q_blocks);
  task.lines = params.work.Lines(p, number, task.h);
  task.flags = *task.lines.flags;
  task.first_key_block = task.h / (p.q_heads / p.kv_heads) * params.work.slots +
                         FirstBlock(task.s, number, p.block_size);
  return task;
}

// A warp multiplies 32 pooled queries, and each of its lanes holds four of them, x = 0 .. 3, of
// cell 8 * tile + lane / 4: all pools of one block of queries, or of two blocks of 64. Where they
// lie in the tile of pooled queries:
__device__ __forceinline__ int RowAt(int cell, int x) {
  return x / 2 * 64 + cell / 8 * 16 + x % 2 * 8 + cell % 8;
}
struct Place {
  int cell, x;
};
// The first pool of query block `block` of the task; the others follow in x.
__device__ __forceinline__ Place PlaceOf(int block, int per_block) {
  if (per_block == 4) return {block, 0};
  return {block / 16 * 8 + block % 8, block / 8 % 2 * 2};
}
__device__ __forceinline__ int PooledRow(int block, int pool, int per_block) {
  const Place place = PlaceOf(block, per_block);
  return RowAt(place.cell, place.x + pool);
}

// Means of 32 queries, as FP16 with a power of two a row: `scale` gives logits in units of ln 2.
// A warp a pool, 16 bytes a lane; the loads of half a pool are in flight while the other is summed.
template <int kChannels, int kPerBlock>
__device__ void PoolQueries(const Params& params, const Task& task, unsigned char* tile,
                            float* scale) {
  constexpr int kChunks = kChannels / 8, kTokens = 32 / kChunks;  // tokens of a load
  constexpr int kLoads = kPool / kTokens / 2;                     // of half a pool
  const Problem& p = params.problem;
  const int lane = threadIdx.x % 32, chunk = lane % kChunks, token = lane / kChunks;
  const bool bf16 = p.dtype == DType::kBF16;
  const int pools = (task.end - task.first) * kPerBlock;
  const int first_token = task.first * kPerBlock * kPool - task.s.prefix + token;
  const int end_token = token < kTokens ? task.s.sq : 0;  // d = 96 leaves lanes without work
  const int64_t stride = p.q.token_stride;
  const uint16_t* q = static_cast<const uint16_t*>(p.q.data) + task.h * p.q.head_stride +
                      task.s.q_begin * stride + 8 * chunk;
  const auto load = [&](int half_pool, uint4(&to)[kLoads]) {
    const int first = first_token + half_pool * (kPool / 2);
    const uint16_t* from = q + first * stride;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int t = first + i * kTokens;
      to[i] = {0, 0, 0, 0};
      if (t >= 0 && t < end_token) {
        to[i] = __ldcs(reinterpret_cast<const uint4*>(from + i * kTokens * stride));
      }
    }
  };
  uint4 loaded[kLoads], next[kLoads];
  int x = threadIdx.x / 32;
  if (x < pools) load(2 * x, loaded);
  for (; x < pools; x += kWarps) {
    float sum[8] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 0) {
        load(2 * x + 1, next);
      } else if (x + kWarps < pools) {
        load(2 * (x + kWarps), next);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint32_t word[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (bf16) {
            sum[2 * c] += __uint_as_float(word[c] << 16);
            sum[2 * c + 1] += __uint_as_float(word[c] & 0xffff0000);
          } else {
            const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word[c]));
            sum[2 * c] += pair.x;
            sum[2 * c + 1] += pair.y;
          }
        }
        loaded[i] = next[i];
      }
    }
    if constexpr (kTokens >= 2) {
#pragma unroll
      for (int step = kTokens / 2 * kChunks; step >= kChunks; step /= 2) {
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] += __shfl_down_sync(~0u, sum[c], step);
      }
    }
    // The largest channel becomes 1 to 2; infinity and NaN stay what they are.
    const int from = (task.first * kPerBlock + x) * kPool - task.s.prefix;
    const int tokens = min(from + kPool, task.s.sq) - max(from, 0);
    const float weight = 1.0f / max(1, tokens);
    float largest = 0;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      sum[c] *= weight;
      if (fabsf(sum[c]) <= FLT_MAX) largest = fmaxf(largest, fabsf(sum[c]));
    }
    const uint32_t bits = __reduce_max_sync(~0u, lane < kChunks ? __float_as_uint(largest) : 0);
    const int exponent = bits == 0 ? 0 : min(max(static_cast<int>(bits >> 23) - 127, -100), 126);
    const float to_one = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
    const int row = PooledRow(x / kPerBlock, x % kPerBlock, kPerBlock);
    if (lane < RowTile<kChannels, kRepairRows>::kChunks) {
      __half2 out[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        out[c] = lane < kChunks ? __floats2half2_rn(sum[2 * c] * to_one, sum[2 * c + 1] * to_one)
                                : __half2();
      }
      *reinterpret_cast<uint4*>(tile + RowTile<kChannels, kRepairRows>::Offset(row, lane)) =
          *reinterpret_cast<const uint4*>(out);
    }
    if (lane == 0) {
      scale[row] = tokens > 0 ? params.scale_log2 * __uint_as_float((exponent + 127u) << 23) : 0.0f;
    }
  }
}

// The maximum and sum of a pooled row, from one of two groups of warps; then of both.
struct RowSum {
  float base, sum;
};

// Logits of 32 pooled queries and one chunk of pooled keys, their exponentials relative to the
// running maximum of each row, summed by blocks of keys and left in scratch.
template <int kChunk, int kPerBlock>
__device__ __forceinline__ void SumBlocks(float (&logits)[2][kChunk / 8][4], int tile,
                                          int first_key, int first_pool, const float* scale,
                                          float4* cells, float4* bases, float (&base)[4],
                                          float (&sum)[4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, column = lane % 4 * 2;
  const int cell = 8 * tile + g;
  float reference[4], row_scale[4];
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    // The pool of this row: keys up to it are seen.
    const int pool = first_pool + (kPerBlock == 4 ? 4 * g + x : 2 * (x / 2 * 8 + g) + x % 2);
    const int seen = pool - first_key - column;
    row_scale[x] = scale[RowAt(cell, x)];
    if (__any_sync(~0u, seen < kChunk)) {
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        if (seen < 8 * j) logits[x / 2][j][x % 2 * 2] = -INFINITY;
        if (seen < 8 * j + 1) logits[x / 2][j][x % 2 * 2 + 1] = -INFINITY;
      }
    }
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
      largest = fmaxf(largest, fmaxf(logits[x / 2][j][x % 2 * 2], logits[x / 2][j][x % 2 * 2 + 1]));
    }
    largest = fmaxf(base[x], QuadMax(largest) * row_scale[x]);
    reference[x] = largest == -INFINITY ? 0.0f : largest;
    sum[x] *= Exp2(base[x] - reference[x]);
    base[x] = largest;
  }
  // A lane's two columns are half of a block of four pools, or a block of two.
  float4* to = cells + cell + int64_t{(first_key + column) / kPerBlock} * kCells;
  const bool writes = kPerBlock == 2 || lane % 2 == 0;
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
    float of_block[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      of_block[x] = Exp2(fmaf(logits[x / 2][j][x % 2 * 2], row_scale[x], -reference[x])) +
                    Exp2(fmaf(logits[x / 2][j][x % 2 * 2 + 1], row_scale[x], -reference[x]));
      sum[x] += of_block[x];
      if (kPerBlock == 4) of_block[x] += __shfl_xor_sync(~0u, of_block[x], 1);
    }
    if (writes) {
      __stcg(to + j * (8 / kPerBlock) * kCells,
             make_float4(of_block[0], of_block[1], of_block[2], of_block[3]));
    }
  }
  if (lane % 4 == 0) {
    __stcg(&bases[int64_t{first_key / kChunk} * kCells + cell],
           make_float4(reference[0], reference[1], reference[2], reference[3]));
  }
}

// A persistent grid; a task is one head and up to 32 (of 64 tokens: 64) blocks of queries, the last
// ones of all heads first, for they are the longest. Heads that need no repair only write the
// blocks of their lines. The others
//   1. pool their queries: each task reads its part of Q, once; Q of other heads is never read;
//   2. multiply them with the pooled keys, 128 x 128 a step, from two buffers: warp w takes 32 rows
//      and half of the keys. One pass: sums of exponentials over each block of keys go to scratch,
//      mostly in the L2 cache, with the maximum they were taken against;
//   3. turn those into rows of the map, and complete each row, a warp a row.
//
// Roofline (32/8/128, 128K tokens, every head): Q once, 1.07 GB, 256 us at 4.2 TB/s; 6.9e10 FLOPs,
// 90 us at 780 TFLOP/s; 2.7e8 exponentials, 73 us; 16 bytes a cell to L2 and back, 0.5 GB, 100 us.
// The reading of one thread block overlaps with the other's products and searches on the same SM.
// It takes 620 to 700 us: the searches are chains of latencies, 7 K cycles a row, and cost most.
template <int kChannels, int kPerBlock>
__global__ void __launch_bounds__(kThreads, 2) RepairKernel(const __grid_constant__ Params params) {
  using At = Layout<kChannels>;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ float scale[kRepairRows];
  __shared__ RowSum row_sum[2][kRepairRows];
  __shared__ Task task;  // not in registers: the products need them
  const Problem& p = params.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* scratch = params.work.scratch + blockIdx.x * params.work.scratch_stride;
  float4* cells = reinterpret_cast<float4*>(scratch);
  float4* bases = reinterpret_cast<float4*>(scratch + CellBytes(p.k_blocks_max));
  unsigned char* search = shared + warp * kSearchStride;

  for (bool first_task = true;; first_task = false) {
    __syncthreads();
    // The second thread block of every SM begins with a short task: from then on one reads queries
    // while the other computes.
    if (threadIdx.x == 0) task = NextTask(params, first_task && blockIdx.x >= gridDim.x / 2);
    __syncthreads();
    if (task.h < 0) return;
    if (task.first >= task.end) continue;
    const bool in_shared = task.s.k_blocks <= kBlocksInShared;
    uint32_t* words = reinterpret_cast<uint32_t*>(search + (in_shared ? 4 * kBlocksInShared : 0));
    if (((task.flags & kNeedsRepair) == 0 && params.rules.most >= task.s.k_blocks) ||
        task.s.sq == 0) {
      for (int I = task.first + warp; I < task.end; I += kWarps) {
        FinishRow(p, params.rules, task, I, nullptr, 0, words);
        __syncwarp();
      }
      continue;
    }

    // 1, 2. Rows of the tile beyond the task's blocks are never read.
    const uint32_t base_address = SharedAddress(shared);
    const __half* pools = reinterpret_cast<const __half*>(params.work.pools) +
                          task.first_key_block * kPerBlock * kChannels;
    const int key_pools = task.end * kPerBlock;  // the last row sees so many
    const int steps = (key_pools + At::kKeys - 1) / At::kKeys;
    // A thread copies the same chunk of every kRowsAtOnce-th row, and so to equally spaced places.
    constexpr int kRowsAtOnce = kThreads / At::Keys::kCopiers;
    static_assert(kRowsAtOnce % 8 == 0);
    const int copied_row = threadIdx.x / At::Keys::kCopiers;
    const int copied_chunk = threadIdx.x % At::Keys::kCopiers;
    const uint32_t copied_to = base_address + At::kK + At::Keys::Offset(copied_row, copied_chunk);
    const auto load = [&](int step) {
      const uint32_t to = copied_to + step % 2 * At::Keys::kBytes;
      const __half* from =
          pools + (int64_t{step} * At::kKeys + copied_row) * kChannels + copied_chunk * 8;
#pragma unroll
      for (int i = 0; i < At::kKeys / kRowsAtOnce && copied_chunk < At::Keys::kChunks; ++i) {
        const int key = step * At::kKeys + copied_row + i * kRowsAtOnce;
        const bool exists = key < key_pools && copied_chunk < kChannels / 8;
        CopyAsync(to + i * kRowsAtOnce * 128, exists ? from + i * kRowsAtOnce * kChannels : pools,
                  exists);
      }
      CopyAsyncCommit();
    };
    load(0);
    PoolQueries<kChannels, kPerBlock>(params, task, shared + At::kQ, scale);
    const int blocks_of_tile = 32 / kPerBlock;
    const int row_tile = warp % kTiles, group = Uniform(warp / kTiles);
    const int tile_begin = task.first + row_tile * blocks_of_tile;
    const int tile_end = min(tile_begin + blocks_of_tile, task.end);  // may lie before the begin
    const int rows[2] = {16 * row_tile, 64 + 16 * row_tile}, tiles[2] = {0, 1};
    float base[4], sum[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      base[x] = -INFINITY;
      sum[x] = 0;
    }
    WaitForRows();
    for (int step = 0; step < steps; ++step) {
      __syncthreads();  // this step is in; nobody reads the other buffer any more
      if (step + 1 < steps) load(step + 1);
      const int first_key = step * At::kKeys + group * At::kChunk;
      const bool mine = tile_begin < tile_end && first_key < tile_end * kPerBlock;
      if (MultipliesByWarpgroup<kChannels>() ? first_key < key_pools : mine) {
        float logits[2][At::kChunk / 8][4];
        RowsTimesKeys<__half, kChannels, kRepairRows, At::kKeys, 2, At::kChunk>(
            logits, base_address + At::kQ, rows, tiles,
            base_address + At::kK + step % 2 * At::Keys::kBytes, group * At::kChunk);
        // Here and not at the end of the step, where its fence would wait for the stores to
        // scratch.
        WaitForRows();
        if (mine) {
          SumBlocks<At::kChunk, kPerBlock>(logits, row_tile, first_key, tile_begin * kPerBlock,
                                           scale, cells, bases, base, sum);
        }
      } else {
        WaitForRows();
      }
    }
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float all = QuadSum(sum[x]);
      if (lane % 4 == 0) row_sum[group][RowAt(8 * row_tile + lane / 4, x)] = {base[x], all};
    }
    __syncthreads();

    // The weight of every pooled row in its block: 1 / (its sum * rows of the block). Rows without
    // queries, and rows that hold NaN or infinity, have none.
    for (int block = threadIdx.x; block < task.end - task.first; block += kThreads) {
      int rows = 0;
      for (int pool = 0; pool < kPerBlock; ++pool) {
        const int r = PooledRow(block, pool, kPerBlock);
        const RowSum a = row_sum[0][r], b = row_sum[1][r];
        const float largest = fmaxf(a.base, b.base), top = largest == -INFINITY ? 0.0f : largest;
        const float all = a.sum * Exp2(a.base - top) + b.sum * Exp2(b.base - top);
        const int from = ((task.first + block) * kPerBlock + pool) * kPool - task.s.prefix;
        const bool counts = from + kPool > 0 && from < task.s.sq && isfinite(all) && all > 0;
        row_sum[0][r] = {top, counts ? 1 / all : 0.0f};
        rows += counts;
      }
      for (int pool = 0; pool < kPerBlock; ++pool) {
        row_sum[0][PooledRow(block, pool, kPerBlock)].sum *= kMapRow / max(1, rows);
      }
    }
    __syncthreads();

    // 3. Eight blocks of queries at a time: the thread block turns their cells into rows of the
    // map, for neighbours share sectors of scratch; then each warp completes one.
    unsigned char* map = in_shared ? shared
                                   : scratch + CellBytes(p.k_blocks_max) +
                                         BaseBytes(p.k_blocks_max, kPerBlock, At::kChunk);
    const int64_t map_stride = in_shared ? kSearchStride : 4 * Padded(p.k_blocks_max);
    for (int begin = task.first; begin < task.end; begin += 8) {
      const int rows = min(8, task.end - begin), padded = static_cast<int>(Padded(begin + rows));
      const Place place = PlaceOf(begin - task.first, kPerBlock);
      const int g = threadIdx.x % 8;
      RowSum weight[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        weight[x] = row_sum[0][RowAt(place.cell + g, x)];
        if (x < place.x || x >= place.x + kPerBlock) weight[x].sum = 0;
      }
      uint32_t* row = reinterpret_cast<uint32_t*>(map + g * map_stride);
      const int seen = g < rows ? begin + g : -1;
      constexpr int kAtOnce = 4;  // loads in flight
      for (int first_J = threadIdx.x / 8; first_J < padded; first_J += kAtOnce * kThreads / 8) {
        float4 cell[kAtOnce], reference[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int J = min(first_J + i * kThreads / 8, begin + rows - 1);
          const int chunk = J * kPerBlock / At::kChunk;
          cell[i] = __ldcg(&cells[int64_t{J} * kCells + place.cell + g]);
          reference[i] = __ldcg(&bases[int64_t{chunk} * kCells + place.cell + g]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int J = first_J + i * kThreads / 8;
          const float sums[4] = {cell[i].x, cell[i].y, cell[i].z, cell[i].w};
          const float bases_of[4] = {reference[i].x, reference[i].y, reference[i].z,
                                     reference[i].w};
          float mass = 0;
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            if (weight[x].sum == 0) continue;  // and then the sums may be anything
            mass += sums[x] * Exp2(fminf(bases_of[x] - weight[x].base, 0.0f)) * weight[x].sum;
          }
          if (J < padded) row[J] = J <= seen ? __float2uint_rn(mass) : 0;
        }
      }
      __syncthreads();
      if (warp < rows) {
        FinishRow(p, params.rules, task, begin + warp,
                  reinterpret_cast<int*>(map + warp * map_stride), padded, words);
      }
      __syncthreads();
    }
  }
}

template <int kChannels, int kPerBlock>
cudaError_t LaunchOf(const Params& params, int multiprocessors, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(RepairKernel<kChannels, kPerBlock>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, Layout<kChannels>::kBytes);
  if (error != cudaSuccess) return error;
  const int grid = std::min({2 * multiprocessors, params.work.scratch_blocks, params.tasks});
  RepairKernel<kChannels, kPerBlock><<<grid, kThreads, Layout<kChannels>::kBytes, stream>>>(params);
  return cudaGetLastError();
}

template <int kChannels>
cudaError_t Launch(const Params& params, int multiprocessors, cudaStream_t stream) {
  return params.problem.block_size == 4 * kPool
             ? LaunchOf<kChannels, 4>(params, multiprocessors, stream)
             : LaunchOf<kChannels, 2>(params, multiprocessors, stream);
}

using Table = KernelTable<64, 96, 128, 256>;

}  // namespace

bool HasRepair(DType dtype, int head_dim) {
  return Table::Has(dtype, head_dim) || PlainTable::Has(dtype, head_dim);
}

size_t RepairScratchBytes(const Problem& problem) {
  if (PlainTable::Has(problem.dtype, problem.head_dim)) return RepairF32ScratchBytes(problem);
  const int64_t n = std::max(1, problem.k_blocks_max);
  return static_cast<size_t>(CellBytes(n) +
                             BaseBytes(n, problem.block_size / kPool, ChunkOf(problem.head_dim)) +
                             (n > kBlocksInShared ? kWarps * Padded(n) * 4 : 0));
}

cudaError_t RepairRows(const Selection& selection, const JointWork& work, int multiprocessors,
                       cudaStream_t stream) {
  const Problem& p = selection.problem;
  if (p.q_blocks_max == 0) return cudaSuccess;
  if (PlainTable::Has(p.dtype, p.head_dim)) return RepairRowsF32(selection, work, stream);
  Params params = {.problem = p,
                   .work = work,
                   .rules = RulesOf(selection),
                   .scale_log2 = p.softmax_scale * 1.4426950408889634f,
                   .tiles_max = 0,
                   .tasks = 0,
                   .blocks_of_task = kRepairRows / (p.block_size / kPool)};
  // As many blocks of queries as a task can hold, so that pooled keys are read seldom, unless that
  // leaves SMs without one.
  const int least_blocks = 32 / (p.block_size / kPool);
  const auto tasks = [&](int blocks) {
    return CeilDiv(p.q_blocks_max, blocks) * p.q_heads * p.sequences;
  };
  while (params.blocks_of_task > least_blocks &&
         tasks(params.blocks_of_task) < 3 * multiprocessors) {
    params.blocks_of_task /= 2;
  }
  params.tiles_max = static_cast<int32_t>(CeilDiv(p.q_blocks_max, params.blocks_of_task));
  params.tasks = static_cast<int32_t>(tasks(params.blocks_of_task));
  return Table::Launch(p.dtype, p.head_dim, [&]<typename T, int kChannels>() {
    return Launch<kChannels>(params, multiprocessors, stream);
  });
}

}  // namespace prefilld::cuda
