// FlexPrefill, what query-aware heads add: the largest blocks of attention pooled over blocks, as
// long as their sum stays within gamma of all rows.
//
// The pooled map of a head is n (n + 1) / 2 floats. As many heads at a time as fit in the workspace
// have theirs written, row by row, then cut and added to the bitmap; the others' thread blocks end
// at once.
#include "kernels/cuda/select/flexprefill/cut.cuh"
#include "kernels/cuda/select/flexprefill/tile.cuh"

namespace prefilld::cuda {
namespace {

// Heads [first_head, first_head + heads) of sequences [first_sequence, first_sequence + sequences).
struct Round {
  int first_sequence, sequences, first_head, heads;
};

struct Pair {
  Sequence sequence;
  int head;
  bool query_aware;
  float* map;  // [n (n + 1) / 2], row I from I (I + 1) / 2
};

__device__ Pair FindPair(const FlexPrefill& f, const Round& round, int x) {
  const int index = round.first_sequence + x / round.heads;
  Pair pair;
  pair.sequence = f.problem.sequence[index];
  pair.head = round.first_head + x % round.heads;
  pair.query_aware =
      !f.IsShort(pair.sequence) &&
      f.budget[static_cast<int64_t>(index) * f.problem.q_heads + pair.head].query_aware != 0;
  if (!pair.query_aware) return pair;
  const auto size = [&](int s) {
    const int64_t n = f.problem.sequence[s].k_blocks;
    return n * (n + 1) / 2;
  };
  int64_t before = x % round.heads * size(index);
  for (int s = round.first_sequence; s < index; ++s) before += round.heads * size(s);
  pair.map = f.pooled_map + before;
  return pair;
}

constexpr int kMapThreads = 256;
constexpr int kMapRows = 32;      // query blocks of a thread block, 2 a thread
constexpr int kMapColumns = 64;   // key blocks of a step, 4 a thread
constexpr int kMapChannels = 32;  // of the keys in shared memory at a time

// Channels [8 piece, 8 piece + 8) of a query.
__device__ __forceinline__ void LoadQuery8(const Problem& p, const Sequence& s, int head, int token,
                                           int piece, float (&x)[8]) {
  if (p.dtype == DType::kF32) {
    const auto* from = reinterpret_cast<const float4*>(QueryRow<float>(p, s, head, token));
    const float4 low = from[2 * piece], high = from[2 * piece + 1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    return;
  }
  const uint4 loaded = reinterpret_cast<const uint4*>(QueryRow<uint16_t>(p, s, head, token))[piece];
  if (p.dtype == DType::kBF16) {
    Widen8<__nv_bfloat16>(loaded, x);
  } else {
    Widen8<__half>(loaded, x);
  }
}

// Mean queries of the rows, unrounded, times 1 / sqrt d: to query[row][channel].
__device__ void PoolQueries(const Problem& p, const Sequence& s, int head, int first_row,
                            float* query) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pieces = p.head_dim / 8, at_once = 32 / pieces;
  const int group = lane / pieces, piece = lane % pieces;
  const float scale = static_cast<float>(1 / sqrt(static_cast<double>(p.head_dim)));
  for (int row = warp; row < kMapRows; row += kMapThreads / 32) {
    const int begin = (first_row + row) * p.block_size;
    const int tokens = min(p.block_size, s.sk - begin);
    float sum[8] = {};
    if (group < at_once) {
#pragma unroll 4
      for (int t = group; t < tokens; t += at_once) {
        float x[8];
        LoadQuery8(p, s, head, begin + t, piece, x);
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] += x[c];
      }
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float all = 0;
      for (int g = 0; g < at_once; ++g) all += __shfl_sync(~0u, sum[c], piece + g * pieces);
      if (group == 0) {
        query[row * p.head_dim + piece * 8 + c] =
            tokens > 0 ? all / static_cast<float>(tokens) * scale : 0;
      }
    }
  }
}

// Rows of the pooled map, softmax included. Each thread writes its own entries and is the only one
// to read them again. FLOPs: n^2 d a head, on the FP32 units: the means are not rounded. At 128K
// tokens 1.3e8 a head; nothing here is meant to be fast.
__global__ void __launch_bounds__(kMapThreads) PooledMapKernel(FlexPrefill f, Round round) {
  extern __shared__ __align__(16) char shared[];
  const Problem& p = f.problem;
  const Pair pair = FindPair(f, round, blockIdx.y);
  if (!pair.query_aware) return;
  const Sequence& s = pair.sequence;
  const int n = s.k_blocks, d = p.head_dim;
  // The longest rows first.
  const int tiles = (n + kMapRows - 1) / kMapRows;
  const int first_row = (tiles - 1 - static_cast<int>(blockIdx.x)) * kMapRows;
  if (first_row < 0) return;
  float* const query = reinterpret_cast<float*>(shared);  // [rows, d]
  auto* const key =
      reinterpret_cast<float(*)[kMapChannels + 1]>(query + kMapRows * d);  // [columns]
  PoolQueries(p, s, pair.head, first_row, query);
  const int64_t kv_row = pair.head / (p.q_heads / p.kv_heads) * p.rows + s.row_begin;
  const float* mean = f.key_mean + kv_row * d;

  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  const int last_row = min(first_row + kMapRows, n) - 1;
  const auto entry = [&](int i, int J) -> float& {
    const int64_t I = first_row + 2 * y + i;
    return pair.map[I * (I + 1) / 2 + J];
  };
  const auto has = [&](int i, int J) {
    const int I = first_row + 2 * y + i;
    return I < n && J <= I;
  };
  float max[2] = {-kInfinity, -kInfinity};
  for (int column = 0; column <= last_row; column += kMapColumns) {
    float sum[2][4] = {};
    for (int channel = 0; channel < d; channel += kMapChannels) {
      const int channels = min(kMapChannels, d - channel);
      __syncthreads();
      for (int z = threadIdx.x; z < kMapColumns * kMapChannels; z += kMapThreads) {
        const int J = column + z / kMapChannels, c = z % kMapChannels;
        key[z / kMapChannels][c] =
            J < n && c < channels ? mean[static_cast<int64_t>(J) * d + channel + c] : 0;
      }
      __syncthreads();
#pragma unroll 8
      for (int c = 0; c < channels; ++c) {
        const float upper = query[2 * y * d + channel + c],
                    lower = query[(2 * y + 1) * d + channel + c];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sum[0][k] = fmaf(upper, key[x + 16 * k][c], sum[0][k]);
          sum[1][k] = fmaf(lower, key[x + 16 * k][c], sum[1][k]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int J = column + x + 16 * k;
        if (!has(i, J)) continue;
        max[i] = fmaxf(max[i], sum[i][k]);
        entry(i, J) = sum[i][k];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int step = 8; step > 0; step /= 2) {
      max[i] = fmaxf(max[i], __shfl_xor_sync(~0u, max[i], step));
    }
    float sum = 0;
    for (int J = x; has(i, J); J += 16) sum += expf(entry(i, J) - max[i]);
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    // A row that holds NaN or infinity says nothing.
    const bool finite = sum < kInfinity;
    for (int J = x; has(i, J); J += 16) {
      entry(i, J) = finite ? expf(entry(i, J) - max[i]) / sum : 0;
    }
  }
}

// The flat position before which `wanted` entries have these bits. By all threads.
__device__ int64_t FindPosition(const float* map, int64_t size, uint32_t bits, int64_t wanted) {
  constexpr int kAtOnce = 8;
  for (int64_t begin = 0; begin < size; begin += kAtOnce * kCutThreads) {
    bool match[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t at = begin + k * kCutThreads + threadIdx.x;
      match[k] = at < size && __float_as_uint(map[at]) == bits;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int found = __syncthreads_count(match[k]);
      if (found < wanted) {
        wanted -= found;
        continue;
      }
      int threads = 0;  // the most that hold less than `wanted`
      for (int bit = kCutThreads / 2; bit > 0; bit /= 2) {
        const int below = threads + bit;
        if (__syncthreads_count(match[k] && static_cast<int>(threadIdx.x) < below) < wanted) {
          threads = below;
        }
      }
      return begin + k * kCutThreads + threads + 1;
    }
  }
  return size;
}

// Bytes: a head's map five or six times, 2 MB each at 128K tokens.
__global__ void __launch_bounds__(kCutThreads, 1) PooledBlocksKernel(FlexPrefill f, Round round) {
  extern __shared__ __align__(16) char shared[];
  const Pair pair = FindPair(f, round, blockIdx.x);
  if (!pair.query_aware) return;
  const int n = pair.sequence.k_blocks;
  const int64_t size = static_cast<int64_t>(n) * (n + 1) / 2;
  const Cut cut = FindCut([&](int64_t i) { return pair.map[i]; }, size, f.gamma * n, 0, 1,
                          reinterpret_cast<CutMemory*>(shared));
  const int64_t ties_end = cut.equal >= cut.ties ? size
                           : cut.equal == 0      ? 0
                                            : FindPosition(pair.map, size, cut.bits, cut.equal);
  const int lane = threadIdx.x % 32;
  const int64_t words = f.Words();
  const int64_t first_row = pair.head * f.problem.rows + pair.sequence.row_begin;
  for (int I = threadIdx.x / 32; I < n; I += kCutThreads / 32) {
    const int64_t row = static_cast<int64_t>(I) * (I + 1) / 2;
    for (int J = 0; J <= I; J += 32) {
      bool keep = false;
      if (J + lane <= I) {
        const uint32_t bits = __float_as_uint(pair.map[row + J + lane]);
        keep = bits > cut.bits || (bits == cut.bits && row + J + lane < ties_end);
      }
      const unsigned word = __ballot_sync(~0u, keep);
      if (lane == 0 && word != 0) f.bitmap[(first_row + I) * words + J / 32] |= word;
    }
  }
}

cudaError_t Run(const FlexPrefill& f, const Round& round, int n_max, cudaStream_t stream) {
  const int map_bytes = (kMapRows * f.problem.head_dim + kMapColumns * (kMapChannels + 1)) *
                        static_cast<int>(sizeof(float));
  const int pairs = round.sequences * round.heads;
  PooledMapKernel<<<dim3((n_max + kMapRows - 1) / kMapRows, pairs), kMapThreads, map_bytes,
                    stream>>>(f, round);
  PooledBlocksKernel<<<pairs, kCutThreads, sizeof(CutMemory), stream>>>(f, round);
  return cudaGetLastError();
}

}  // namespace

cudaError_t FlexPrefillQueryAware(const FlexPrefill& f, cudaStream_t stream) {
  const Problem& p = f.problem;
  const cudaError_t error = cudaFuncSetAttribute(
      PooledBlocksKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(CutMemory));
  if (error != cudaSuccess) return error;
  const int64_t room = kPooledMapBytes / static_cast<int64_t>(sizeof(float));
  // Whole sequences as long as they fit together; a longer one in parts of its heads.
  Round round = {0, 0, 0, p.q_heads};
  int64_t used = 0;
  int n_max = 0;
  const auto flush = [&] {
    const cudaError_t result = n_max > 0 ? Run(f, round, n_max, stream) : cudaSuccess;
    used = 0;
    n_max = 0;
    return result;
  };
  for (int s = 0; s < p.sequences; ++s) {
    const Sequence& sequence = p.host_sequence[s];
    const int64_t size = TriangleSize(sequence.k_blocks);
    const bool fits = size * p.q_heads <= room;
    if (round.sequences > 0 &&
        (!fits || used + size * p.q_heads > room || (round.sequences + 1) * p.q_heads > 65535)) {
      if (const cudaError_t result = flush(); result != cudaSuccess) return result;
      round.sequences = 0;
    }
    if (fits) {
      if (round.sequences == 0) round.first_sequence = s;
      ++round.sequences;
      used += size * p.q_heads;
      if (!f.IsShort(sequence)) n_max = std::max(n_max, sequence.k_blocks);
      continue;
    }
    if (f.IsShort(sequence)) continue;
    const int heads = static_cast<int>(std::max<int64_t>(room / size, 1));
    for (int h = 0; h < p.q_heads; h += heads) {
      const Round part = {s, 1, h, std::min(heads, p.q_heads - h)};
      const cudaError_t result = Run(f, part, sequence.k_blocks, stream);
      if (result != cudaSuccess) return result;
    }
  }
  return flush();
}

}  // namespace prefilld::cuda
