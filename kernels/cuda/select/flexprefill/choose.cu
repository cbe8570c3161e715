// FlexPrefill, the blocks of a head: the best key blocks and block diagonals, and their union.
#include "kernels/cuda/select/flexprefill/flexprefill.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kLines = 2;  // kinds of them: key blocks and diagonals
constexpr uint32_t kInfinityBits = 0x7f800000;

struct Choice {
  const uint32_t* score;  // [n] floats from 0 up, as bits
  int wanted;             // of the largest; ties: the lower index
  uint32_t* chosen;       // a bit a score
};

// Both kinds at once, by all threads: the least score that is chosen, 8 bits a round, from a
// histogram of the scores that begin with the bits found before.
__device__ void ChooseLargest(const Choice (&choices)[kLines], int n) {
  constexpr int kBins = 256;
  __shared__ int histogram[kLines][kBins];
  __shared__ uint32_t least[kLines];
  __shared__ int wanted[kLines];  // of those that begin with `least`
  __shared__ int warp_ties[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int padded = (n + kThreads - 1) / kThreads * kThreads;
  if (threadIdx.x < kLines) {
    least[threadIdx.x] = 0;
    wanted[threadIdx.x] = choices[threadIdx.x].wanted;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int x = threadIdx.x; x < kLines * kBins; x += kThreads)
      histogram[x / kBins][x % kBins] = 0;
    __syncthreads();
    for (int kind = 0; kind < kLines; ++kind) {
      const uint32_t begin = least[kind];
      for (int x = threadIdx.x; x < padded; x += kThreads) {
        const uint32_t score = x < n ? choices[kind].score[x] : ~0u;
        const bool counts = x < n && (shift == 24 || score >> (shift + 8) == begin);
        const uint32_t bin = counts ? score >> shift & (kBins - 1) : kBins;
        // Scores are alike: one addition for all lanes of a bin.
        const unsigned same = __match_any_sync(~0u, bin);
        if (counts && lane == __ffs(static_cast<int>(same)) - 1) {
          atomicAdd(&histogram[kind][bin], __popc(same));
        }
      }
    }
    __syncthreads();
    if (warp < kLines) {  // the bins from the top, 8 a lane
      const int top = kBins - 1 - 8 * lane;
      int own = 0;
      for (int x = 0; x < 8; ++x) own += histogram[warp][top - x];
      int above = own;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, above, step);
        if (lane >= step) above += other;
      }
      const int goal = wanted[warp];
      const unsigned reach = __ballot_sync(~0u, above >= goal);
      above -= own;
      __syncwarp();                                      // all have read wanted
      if (lane == __ffs(static_cast<int>(reach)) - 1) {  // there are as many as are wanted
        int bin = top;
        while (above + histogram[warp][bin] < goal) above += histogram[warp][bin--];
        least[warp] = least[warp] << 8 | static_cast<uint32_t>(bin);
        wanted[warp] = goal - above;
      }
    }
    __syncthreads();
  }
  for (int kind = 0; kind < kLines; ++kind) {
    const uint32_t limit = least[kind];
    int ties_left = wanted[kind];
    for (int x = threadIdx.x; x < padded; x += kThreads) {
      const uint32_t score = x < n ? choices[kind].score[x] : 0;
      const unsigned ties = __ballot_sync(~0u, x < n && score == limit);
      if (lane == 0) warp_ties[warp] = __popc(ties);
      __syncthreads();
      int before = __popc(ties & ((1u << lane) - 1)), all = 0;
      for (int w = 0; w < kThreads / 32; ++w) {
        before += w < warp ? warp_ties[w] : 0;
        all += warp_ties[w];
      }
      const bool keep = x < n && (score > limit || (score == limit && before < ties_left));
      const unsigned word = __ballot_sync(~0u, keep);
      if (lane == 0 && x < n) choices[kind].chosen[x / 32] = word;
      ties_left -= all;
      __syncthreads();
    }
  }
}

// A head's choice is a few microseconds of latency, so every thread block of a head makes it again
// and writes its share of the rows. Bytes: the bitmap, 4 MB at 128K tokens and 32 heads.
__global__ void __launch_bounds__(kThreads) ChooseKernel(FlexPrefill f, int score_capacity) {
  extern __shared__ uint32_t shared[];
  const Problem& p = f.problem;
  const int head = blockIdx.y;
  const Sequence s = p.sequence[blockIdx.z];
  const int n = s.k_blocks, chosen_words = (p.k_blocks_max + 31) / 32 + 1;
  const int64_t row_begin = head * p.rows + s.row_begin;
  uint32_t* const columns = shared;
  uint32_t* const bins = columns + chosen_words;  // bin u is block offset n - 1 - u
  const int64_t pair = static_cast<int64_t>(blockIdx.z) * p.q_heads + head;
  const bool is_short = f.IsShort(s);
  bool query_aware = false;
  if (!is_short) {
    LineBudget budget = f.budget[pair];
    query_aware = budget.query_aware != 0;
    // The minimum itself, whatever max_budget says.
    if (query_aware) budget.vertical = budget.diagonal = f.least_blocks;
    // In shared memory; for a prompt of millions of tokens in place, where the sums are done with.
    const bool fits = n <= score_capacity;
    auto* const column_score =
        fits ? bins + chosen_words : reinterpret_cast<uint32_t*>(f.block_vertical + row_begin);
    auto* const bin_score = fits ? column_score + score_capacity
                                 : reinterpret_cast<uint32_t*>(f.pooled_probe + row_begin);
    for (int x = threadIdx.x; x < 2 * chosen_words; x += kThreads) columns[x] = 0;
    for (int x = threadIdx.x; x < n; x += kThreads) {
      const float before = x == 0 ? 0 : f.block_diagonal_next[row_begin + x - 1];
      bin_score[x] =
          x == n - 1 ? kInfinityBits : __float_as_uint(f.block_diagonal[row_begin + x] + before);
      column_score[x] = x == 0 ? kInfinityBits : __float_as_uint(f.block_vertical[row_begin + x]);
    }
    __syncthreads();
    ChooseLargest({{column_score, min(budget.vertical, n), columns},
                   {bin_score, min(budget.diagonal, n), bins}},
                  n);
    __syncthreads();
  }

  const int words = static_cast<int>(f.Words());
  const int rows = (n + gridDim.x - 1) / gridDim.x;
  const int first = blockIdx.x * rows, end = min(first + rows, n);
  for (int64_t x = threadIdx.x; x < static_cast<int64_t>(end - first) * words; x += kThreads) {
    const int I = first + static_cast<int>(x / words), w = static_cast<int>(x % words);
    uint32_t word = 0;
    if (32 * w <= I) {
      if (is_short) {
        word = ~0u;
      } else {
        const int from = n - 1 - I + 32 * w;  // J = u - (n - 1 - I)
        word = columns[w] | __funnelshift_r(bins[from / 32], bins[from / 32 + 1], from % 32);
        if (I == 0) word |= 1;
      }
      if (I - 32 * w < 31) word &= (2u << (I - 32 * w)) - 1;
    }
    f.bitmap[(row_begin + I) * words + w] = word;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    HeadReport report;
    report.pattern = is_short      ? Pattern::kDense
                     : query_aware ? Pattern::kQueryAware
                                   : Pattern::kVerticalSlash;
    report.dense_reason = is_short && s.sk > 0 ? DenseReason::kShortPrompt : DenseReason::kNone;
    f.report[pair] = report;
  }
}

}  // namespace

cudaError_t FlexPrefillChoose(const FlexPrefill& f, cudaStream_t stream) {
  const Problem& p = f.problem;
  const int chosen = 2 * ((p.k_blocks_max + 31) / 32 + 1) * static_cast<int>(sizeof(uint32_t));
  constexpr int kStatic = 8192;  // what the kernel has besides, at most
  const int pair = kLines * static_cast<int>(sizeof(float));
  const int capacity = std::min(p.k_blocks_max, (SharedMemoryLimit() - kStatic - chosen) / pair);
  const int bytes = chosen + capacity * pair;
  const cudaError_t error =
      cudaFuncSetAttribute(ChooseKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int slices = capacity < p.k_blocks_max ? 1 : std::clamp(p.k_blocks_max / 128, 1, 16);
  ChooseKernel<<<dim3(slices, p.q_heads, p.sequences), kThreads, bytes, stream>>>(f, capacity);
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
