// FlexPrefill, what a head is given: the number of blocks for its verticals and its diagonals, and
// whether attention of the mean probe row over mean keys predicts the verticals (query-aware).
#include "kernels/cuda/select/flexprefill/cut.cuh"
#include "kernels/cuda/select/flexprefill/tile.cuh"

namespace prefilld::cuda {
namespace {

enum Question { kDiagonal, kVertical, kPattern, kQuestions };

// k = 1 + how many of the largest scores have a sum within gamma; blocks k / 128 + 1, with 128 a
// literal of the released code.
__device__ int CountBlocks(const FlexPrefill& f, const Sequence& s, int head, Question question,
                           int part, int parts, CutMemory* memory) {
  const int B = f.problem.block_size;
  const int64_t begin = head * f.Tokens() + static_cast<int64_t>(s.row_begin) * B;
  const float* own = (question == kVertical ? f.vertical : f.diagonal) + begin;
  const float* next = f.diagonal_next + begin - B;
  const auto score = [&](int64_t i) {
    return question == kVertical || i < B ? own[i] : own[i] + next[i];
  };
  const Cut cut = FindCut(score, s.sk, f.gamma * kMassScale, part, parts, memory);
  const int64_t blocks = (cut.kept + 1) / 128 + 1;
  const int64_t least = f.least_blocks, most = min(f.most_blocks, s.k_blocks);
  return static_cast<int>(min(max(blocks, least), most));
}

// Sums in the same order always. `partial` holds a value a warp.
__device__ double BlockSum(double x, double* partial) {
  x = WarpSum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kCutThreads / 32; ++w) sum += partial[w];
  return sum;
}
__device__ float BlockMax(float x, double* partial) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kCutThreads / 32; ++w) x = fmaxf(x, static_cast<float>(partial[w]));
  return x;
}

struct PatternMemory {
  float query[256];  // mean probe row, rounded to bf16
  float part[kCutThreads];
  double partial[kCutThreads / 32];
};

__device__ float QueryChannel(const Problem& p, const Sequence& s, int head, int token,
                              int channel) {
  if (p.dtype == DType::kF32) return QueryRow<float>(p, s, head, token)[channel];
  if (p.dtype == DType::kF16) return __half2float(QueryRow<__half>(p, s, head, token)[channel]);
  return __bfloat162float(QueryRow<__nv_bfloat16>(p, s, head, token)[channel]);
}

// The Jensen-Shannon distance of the pooled probe and the verticals is below tau. It is NaN, below
// nothing, where either holds a zero, or where something is NaN.
__device__ bool IsQueryAware(const FlexPrefill& f, const Sequence& s, int head, PatternMemory* m) {
  const Problem& p = f.problem;
  const int d = p.head_dim, n = s.k_blocks, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const QueryScale scale = ScaleOf(d);
  const int parts = kCutThreads / d, part = threadIdx.x / d, channel = threadIdx.x % d;
  float sum = 0;
  if (part < parts) {
#pragma unroll 8
    for (int r = part; r < p.block_size; r += parts) {
      sum += ScaleQuery(QueryChannel(p, s, head, s.sk - p.block_size + r, channel), scale);
    }
  }
  m->part[threadIdx.x] = sum;
  __syncthreads();
  if (part == 0) {
    sum = 0;
    for (int x = 0; x < parts; ++x) sum += m->part[x * d + channel];
    m->query[channel] = RoundToBFloat16(sum / static_cast<float>(p.block_size));
  }
  __syncthreads();

  const int64_t row = head * p.rows + s.row_begin;
  float* const logit = f.pooled_probe + row;
  const int64_t kv_row = head / (p.q_heads / p.kv_heads) * p.rows + s.row_begin;
  const float* mean = f.key_mean + kv_row * d;
#pragma unroll 4
  for (int J = warp; J < n; J += kCutThreads / 32) {
    float dot = 0;
    for (int c = lane; c < d; c += 32) {
      dot = fmaf(m->query[c], RoundToBFloat16(mean[static_cast<int64_t>(J) * d + c]), dot);
    }
    dot = WarpSum(dot);
    if (lane == 0) logit[J] = dot;
  }
  __syncthreads();
  float largest = -__builtin_huge_valf();
  for (int J = threadIdx.x; J < n; J += kCutThreads) largest = fmaxf(largest, logit[J]);
  largest = BlockMax(largest, m->partial);
  const auto weight = [&](int J) {  // as F32 has it: an exact zero is part of the test
    const double x = static_cast<double>(logit[J]) - largest;
    return x < -87 ? 0 : exp(x);
  };
  double own = 0;
  for (int J = threadIdx.x; J < n; J += kCutThreads) own += weight(J);
  const double total = BlockSum(own, m->partial);
  own = 0;
  for (int J = threadIdx.x; J < n; J += kCutThreads) {
    const double pooled = weight(J) / total;
    const double exact = static_cast<double>(f.block_vertical[row + J]) / kMassScale;
    const double middle = (pooled + exact) / 2;
    own += 0.5 * (pooled * log(pooled / middle) + exact * log(exact / middle));
  }
  const double divergence = BlockSum(own, m->partial);
  return sqrt(divergence < 0 ? 0 : divergence) < f.tau;  // rounding may take equals below zero
}

// Three questions a head, a cluster of `parts` thread blocks each; the third needs one of them. The
// first two read the head's scores four times, from L2: at 128K tokens 0.5 MB (verticals) or 1 MB
// (diagonals), about 5 and 10 us each time. The third reads the mean keys of its kv head, 0.5 MB.
__global__ void __launch_bounds__(kCutThreads, 1) BudgetKernel(FlexPrefill f, int parts) {
  extern __shared__ __align__(16) char shared[];
  // The longest first.
  const auto question = static_cast<Question>(blockIdx.y / f.problem.q_heads);
  const int part = blockIdx.x, head = blockIdx.y % f.problem.q_heads;
  const Sequence s = f.problem.sequence[blockIdx.z];
  if (f.IsShort(s)) return;
  LineBudget* const budget = f.budget + static_cast<int64_t>(blockIdx.z) * f.problem.q_heads + head;
  if (question == kPattern) {
    if (part > 0) return;
    const bool query_aware = IsQueryAware(f, s, head, reinterpret_cast<PatternMemory*>(shared));
    if (threadIdx.x == 0) budget->query_aware = query_aware;
    return;
  }
  const int blocks =
      CountBlocks(f, s, head, question, part, parts, reinterpret_cast<CutMemory*>(shared));
  if (part == 0 && threadIdx.x == 0)
    (question == kVertical ? budget->vertical : budget->diagonal) = blocks;
}

// Whether what runs here was compiled with clusters.
bool HasClusters() {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, BudgetKernel) == cudaSuccess &&
         attributes.ptxVersion >= 90;
}

}  // namespace

cudaError_t FlexPrefillBudgets(const FlexPrefill& f, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(CutMemory);
  static_assert(sizeof(PatternMemory) <= kBytes);
  constexpr int kLeastKeys = 65536;  // of a part; with less the cluster costs more than it saves
  const Problem& p = f.problem;
  cudaError_t error =
      cudaFuncSetAttribute(BudgetKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  // Parts where multiprocessors would be idle otherwise.
  const int64_t questions = 2 * static_cast<int64_t>(p.q_heads) * p.sequences;
  int parts = 1;
  while (HasClusters() && parts < kMaxParts && 2 * parts * questions <= multiprocessors &&
         p.sk_max / (2 * parts) >= kLeastKeys) {
    parts *= 2;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(parts), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(parts, kQuestions * p.q_heads, p.sequences);
  config.blockDim = dim3(kCutThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = parts > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, BudgetKernel, f, parts);
}

}  // namespace prefilld::cuda
