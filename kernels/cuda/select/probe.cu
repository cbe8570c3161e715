// Exact block mass of 64 rows per head, and the pools of keys, in one pass over K.
#include <algorithm>
#include <cfloat>

#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/pages.cuh"
#include "kernels/cuda/select/probe.cuh"
#include "kernels/cuda/select/probe_mma.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Keys of a step: 16 KB at d = 128. Two of them and the rows of four heads are 96 KB, so that two
// thread blocks share an SM and one computes while the other waits.
constexpr int kKeys = 64;
// Heads of a kv group that a thread block takes: a warp has 32 of their rows, so at most four. A
// wider group reads K again, from L2. At d = 256 four heads would leave no room for keys.
template <int kChannels>
constexpr int kHeadsMax = kChannels <= 128 ? 4 : 1;

struct Params {
  Problem problem;
  RowRule rule;
  float scale_log2;  // softmax_scale / ln 2
  int64_t slots;
  int head_parts;  // thread blocks that share a kv group
  BlockPart* parts;
  __half* pools;  // or null
};

// Row r of head h (of this thread block) in the tile of rows: 16 rows of each of four heads
// together make the 64 of one product, so that rows that see nothing of a block can be left out.
template <int kChannels>
__device__ __forceinline__ int RowOf(int head, int r) {
  return kHeadsMax<kChannels> == 1 ? r : r / 16 * 64 + head * 16 + r % 16;
}

template <int kChannels>
struct Layout {
  using Rows = RowTile<kChannels, kHeadsMax<kChannels> * kProbeRows>;
  using Keys = RowTile<kChannels, kKeys>;
  static constexpr int kQ = 0;
  static constexpr int kK = Rows::kBytes;
  static constexpr int kBytes = kK + 2 * Keys::kBytes;
};

// An FP16 mean: what is finite stays finite.
__device__ __forceinline__ __half RoundMean(float x) {
  if (fabsf(x) <= FLT_MAX) x = fminf(fmaxf(x, -65504.0f), 65504.0f);
  return __float2half_rn(x);
}

// What pools of keys are relative to: a channel of the mean of some of a sequence's keys. To add
// the same to every key changes no softmax, and beside a large part that all keys share (a
// projection's bias gives them one) FP16 would lose what they differ in: in the first layer of
// Qwen2.5-Coder-1.5B the blocks chosen have an IoU of .996 with the oracle's without, .9998 with
// it.
template <typename T>
__device__ float CenterOf(const T* keys, int64_t stride, int tokens) {
  float sum = 0;
#pragma unroll 8
  for (int t = 0; t < tokens; ++t) sum += static_cast<float>(keys[t * stride]);
  const float mean = sum / static_cast<float>(tokens);
  return fabsf(mean) <= FLT_MAX ? mean : 0;
}

// The means of the two pools of a step, less the center, by half of the thread block: a thread sums
// 32 tokens of two channels.
template <typename T, int kChannels>
__device__ void PoolKeys(const unsigned char* keys, int thread, int valid, const float* center,
                         __half* out) {
  for (int x = thread; x < kKeys / kPool * kChannels / 2; x += kThreads / 2) {
    const int pool = x / (kChannels / 2), pair = x % (kChannels / 2);
    float2 sum = {0, 0};
#pragma unroll 8
    for (int t = 0; t < kPool; ++t) {
      const int offset = Layout<kChannels>::Keys::Offset(pool * kPool + t, pair / 4) + pair % 4 * 4;
      const float2 token = Unpack<T>(*reinterpret_cast<const uint32_t*>(keys + offset));
      sum.x += token.x;
      sum.y += token.y;
    }
    const int tokens = min(kPool, valid - pool * kPool);  // the others are zeros
    const float weight = tokens > 0 ? 1.0f / tokens : 0.0f;
    reinterpret_cast<__half2*>(out)[x] = {RoundMean(sum.x * weight - center[2 * pair]),
                                          RoundMean(sum.y * weight - center[2 * pair + 1])};
  }
}

// The running maximum and sum of the rows of one warp over one block of keys.
struct Rows {
  float largest[2][2], sum[2][2];  // [tile][row of the lane: lane / 4, and 8 below]
};

// Rows of `kUnits` tiles against one step of keys. position: of the query of each row, -1 for none.
template <typename T, int kChannels, int kUnits>
__device__ __forceinline__ void ProbeStep(uint32_t q, const int (&tile_row)[2],
                                          const int (&tile)[2], const int (&first)[2],
                                          uint32_t keys, int key, const int* position,
                                          float scale_log2, Rows* rows) {
  float logits[2][kKeys / 8][4];
  RowsTimesKeys<T, kChannels, kHeadsMax<kChannels> * kProbeRows, kKeys, kUnits, kKeys>(
      logits, q, tile_row, tile, keys, 0);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Keys after the query are not seen; most steps lie before all queries of the tile.
      const int seen = position[first[u] + lane / 4 + 8 * half] - key - lane % 4 * 2;
      if (__any_sync(~0u, seen < kKeys)) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          if (seen < 8 * j) logits[u][j][2 * half] = -INFINITY;
          if (seen < 8 * j + 1) logits[u][j][2 * half + 1] = -INFINITY;
        }
      }
      float largest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        largest = fmaxf(largest, fmaxf(logits[u][j][2 * half], logits[u][j][2 * half + 1]));
      }
      largest = fmaxf(rows->largest[u][half], QuadMax(largest) * scale_log2);
      const float base = largest == -INFINITY ? 0.0f : largest;
      float sum = rows->sum[u][half] * Exp2(rows->largest[u][half] - base);
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        sum += Exp2(fmaf(logits[u][j][2 * half], scale_log2, -base)) +
               Exp2(fmaf(logits[u][j][2 * half + 1], scale_log2, -base));
      }
      rows->largest[u][half] = largest;
      rows->sum[u][half] = sum;
    }
  }
}

// A thread block takes one kv head of one sequence, up to four of its query heads, and every
// gridDim.x-th block of keys: each then has the same mix of blocks that many rows see and blocks
// that few do. Its rows stay in shared memory; steps of 64 keys stream through two buffers. Each of
// the two warpgroups takes two tiles of 16 rows of all heads, {3, 0} or {2, 1}, warp w those of
// head w: rows ascend, so tiles 0 and 1 stop seeing keys halfway, and the pairs have equal work in
// the mean.
//
// Roofline (32/8/128): reads K once, 268 MB at 128K tokens, 64 us at 4.2 TB/s; 4.3e10 FLOPs (the
// visible tiles, 5/8 of rows x keys), 55 us at 780 TFLOP/s; an exponential a logit, 1.7e8, 45 us.
// The two thread blocks of an SM overlap them in part: 190 us. Writes 8 bytes a visible (row,
// block), 8 MB.
template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads, 2) ProbeKernel(const __grid_constant__ Params params) {
  using At = Layout<kChannels>;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ int position[kProbeRows];
  __shared__ float center[kChannels];
  const Problem& p = params.problem;
  const Sequence s = p.sequence[blockIdx.z];
  const int n = s.k_blocks, rows = ProbeRowCount(s);
  if (rows == 0 || static_cast<int>(blockIdx.x) >= n) return;
  const int group = p.q_heads / p.kv_heads;
  const int kv = blockIdx.y / params.head_parts, part = blockIdx.y % params.head_parts;
  const int first_head = kv * group + part * kHeadsMax<kChannels>;
  const int heads = min(kHeadsMax<kChannels>, group - part * kHeadsMax<kChannels>);
  const uint32_t base = SharedAddress(shared);

  const T* q =
      static_cast<const T*>(p.q.data) + s.q_begin * p.q.token_stride + first_head * p.q.head_stride;
  for (int x = threadIdx.x; x < kHeadsMax<kChannels> * kProbeRows * At::Rows::kChunks;
       x += kThreads) {
    const int chunk = x % At::Rows::kChunks, r = x / At::Rows::kChunks % kProbeRows;
    const int head = x / At::Rows::kChunks / kProbeRows;
    const bool exists = r < rows && head < heads && chunk < kChannels / 8;
    const int64_t token = exists ? ProbeRow(params.rule, r, s.sq) : 0;
    CopyAsync(base + At::kQ + At::Rows::Offset(RowOf<kChannels>(head, r), chunk),
              exists ? q + token * p.q.token_stride + head * p.q.head_stride + chunk * 8 : q,
              exists);
  }
  if (threadIdx.x < kProbeRows) {
    const int r = threadIdx.x;
    position[r] = r < rows ? s.prefix + ProbeRow(params.rule, r, s.sq) : -1;
  }

  const int halves = p.block_size == 2 * kKeys;  // steps of a block: 2^halves
  const int steps = ((n - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
                     static_cast<int>(gridDim.x))
                    << halves;
  const auto block_of = [&](int step) {
    return static_cast<int>(blockIdx.x + (step >> halves) * gridDim.x);
  };
  const auto begin_of = [&](int step) { return (step & halves) * kKeys; };  // in its block
  // Keys of this kv head: contiguous, or of the page of a block.
  const T* k =
      static_cast<const T*>(p.k.data) + kv * p.k.head_stride + s.k_begin * p.k.token_stride;
  const int64_t stride = p.pages != nullptr ? kChannels : p.k.token_stride;
  const void* base_of_k = p.pages != nullptr ? p.arena : p.k.data;
  const auto key_of = [&](int32_t token) {  // the tokens of its block follow it
    return p.pages != nullptr
               ? static_cast<const T*>(p.arena) + PagedRow(p, s.page_begin, token, kv) * kChannels
               : k + static_cast<int64_t>(token) * stride;
  };
  // A thread copies the same chunk of every kRowsAtOnce-th row, and so to equally spaced places.
  constexpr int kRowsAtOnce = kThreads / At::Keys::kCopiers;
  static_assert(kRowsAtOnce % 8 == 0);
  const int copied_row = threadIdx.x / At::Keys::kCopiers;
  const int copied_chunk = threadIdx.x % At::Keys::kCopiers;
  const uint32_t copied_to = base + At::kK + At::Keys::Offset(copied_row, copied_chunk);
  const auto load = [&](int step) {
    const int first_key = block_of(step) * p.block_size + begin_of(step);
    const T* from = key_of(first_key);
    const int exist = s.sk - first_key;
    from += copied_row * stride + copied_chunk * 8;
    const uint32_t to = copied_to + step % 2 * At::Keys::kBytes;
#pragma unroll
    for (int i = 0; i < kKeys / kRowsAtOnce && copied_chunk < At::Keys::kChunks; ++i) {
      const bool exists = copied_row + i * kRowsAtOnce < exist && copied_chunk < kChannels / 8;
      CopyAsync(to + i * kRowsAtOnce * 128, exists ? from + i * kRowsAtOnce * stride : base_of_k,
                exists);
    }
    CopyAsyncCommit();
  };

  load(0);
  const bool pools = params.pools != nullptr && part == 0;
  if (pools && threadIdx.x < kChannels) {  // a pool in the middle: the first keys are unlike others
    const int middle = n / 2 * p.block_size;
    center[threadIdx.x] = CenterOf(key_of(middle) + threadIdx.x, stride, min(kPool, s.sk - middle));
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = kHeadsMax<kChannels> == 1 ? 0 : warp % 4;
  // The tile of 16 rows that sees more, and the other one. At d = 256 two warps do it all.
  const int late = Uniform(kHeadsMax<kChannels> == 1 ? max(2, 3 - warp) : 3 - warp / 4);
  const bool works = kHeadsMax<kChannels> > 1 || warp < 2;
  const int tile[2] = {late, 3 - late};
  const int first[2] = {16 * late, 16 * (3 - late)};
  const int tile_row[2] = {RowOf<kChannels>(head, first[0]), RowOf<kChannels>(head, first[1])};
  const int last[2] = {
      first[0] < rows ? s.prefix + ProbeRow(params.rule, min(first[0] + 15, rows - 1), s.sq) : -1,
      first[1] < rows ? s.prefix + ProbeRow(params.rule, min(first[1] + 15, rows - 1), s.sq) : -1};
  const int64_t first_slot = FirstBlock(s, blockIdx.z, p.block_size);
  BlockPart* parts =
      params.parts +
      (static_cast<int64_t>(first_head + head) * kProbeRows + lane / 4) * params.slots + first_slot;
  Rows state;
  for (int step = 0; step < steps; ++step) {
    WaitForRows();
    __syncthreads();  // this step is in; nobody reads the other buffer any more
    if (step + 1 < steps) load(step + 1);
    const int J = block_of(step), in_block = begin_of(step);
    const int key = J * p.block_size + in_block;
    const uint32_t keys = base + At::kK + step % 2 * At::Keys::kBytes;

    if (works) {
      if (in_block == 0) {
#pragma unroll
        for (int x = 0; x < 4; ++x) {
          state.largest[x / 2][x % 2] = -INFINITY;
          state.sum[x / 2][x % 2] = 0;
        }
      }
      if (last[1] >= key) {  // and so do the rows of the other tile

        ProbeStep<T, kChannels, 2>(base + At::kQ, tile_row, tile, first, keys, key, position,
                                   params.scale_log2, &state);
      } else if (last[0] >= key) {
        ProbeStep<T, kChannels, 1>(base + At::kQ, tile_row, tile, first, keys, key, position,
                                   params.scale_log2, &state);
      }
      if (in_block + kKeys == p.block_size) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int r = first[u] + 8 * half;
            const float sum = QuadSum(state.sum[u][half]);
            if (lane % 4 == 0 && head < heads && position[r + lane / 4] >= J * p.block_size) {
              parts[r * params.slots + J] = {state.largest[u][half], sum};
            }
          }
        }
      }
    }
    // The two halves of the thread block take turns.
    if (pools && warp / (kWarps / 2) == step % 2) {
      const int64_t pool = ((kv * params.slots + first_slot + J) * p.block_size + in_block) / kPool;
      PoolKeys<T, kChannels>(shared + At::kK + step % 2 * At::Keys::kBytes,
                             threadIdx.x % (kThreads / 2), s.sk - key, center,
                             params.pools + pool * kChannels);
    }
  }
}

template <typename T, int kChannels>
cudaError_t Launch(Params params, int multiprocessors, cudaStream_t stream) {
  const Problem& p = params.problem;
  const int group = p.q_heads / p.kv_heads;
  params.head_parts = (group + kHeadsMax<kChannels> - 1) / kHeadsMax<kChannels>;
  const cudaError_t error =
      cudaFuncSetAttribute(ProbeKernel<T, kChannels>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           Layout<kChannels>::kBytes);
  if (error != cudaSuccess) return error;
  const int64_t others = static_cast<int64_t>(p.kv_heads) * params.head_parts * p.sequences;
  const int64_t share = (2 * multiprocessors + others - 1) / others;
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(share, 1, std::max(1, p.k_blocks_max))),
                  p.kv_heads * params.head_parts, p.sequences);
  ProbeKernel<T, kChannels><<<grid, kThreads, Layout<kChannels>::kBytes, stream>>>(params);
  return cudaGetLastError();
}

using Table = KernelTable<64, 96, 128, 256>;

}  // namespace

bool HasProbe(DType dtype, int head_dim) {
  return Table::Has(dtype, head_dim) || PlainTable::Has(dtype, head_dim);
}

cudaError_t Probe(const Problem& problem, RowRule rule, BlockPart* parts, void* pools,
                  int multiprocessors, cudaStream_t stream) {
  if (PlainTable::Has(problem.dtype, problem.head_dim)) {
    return ProbeF32(problem, rule, parts, pools, multiprocessors, stream);
  }
  const Params params = {.problem = problem,
                         .rule = rule,
                         .scale_log2 = problem.softmax_scale * 1.4426950408889634f,
                         .slots = BlockSlots(problem),
                         .head_parts = 1,
                         .parts = parts,
                         .pools = static_cast<__half*>(pools)};
  return Table::Launch(problem.dtype, problem.head_dim, [&]<typename T, int kChannels>() {
    return Launch<T, kChannels>(params, multiprocessors, stream);
  });
}

}  // namespace prefilld::cuda
