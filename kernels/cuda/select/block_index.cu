// From bitmaps of kept blocks to the block index, and the index that keeps everything.
#include <algorithm>

#include "kernels/cuda/instructions/overlap.cuh"
#include "kernels/cuda/select/block_index.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ uint16_t* RowOf(const Problem& p, int64_t task) {
  return p.index + task * p.index_stride;
}

// A warp a (head, row of blocks). Bytes: the bitmap once and two a kept block, 34 MB at 128K
// tokens, 32 heads and density .5; 10 us.
__global__ void __launch_bounds__(kThreads)
    WriteIndexKernel(const __grid_constant__ Problem p, const uint32_t* bitmap, int64_t words) {
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (task >= p.q_heads * p.rows) return;
  const int64_t row = task % p.rows;
  const Sequence s = p.sequence[SequenceOfRow(p.sequence, p.sequences, row)];
  const int I = s.first_q_block + static_cast<int>(row - s.row_begin);
  const int count = WriteRow(bitmap + task * words, I, RowOf(p, task));
  if (threadIdx.x % 32 == 0) p.count[task] = count;
}

// A thread block a head of a sequence: sums of counts, exact in any order.
__global__ void __launch_bounds__(kThreads)
    DensityKernel(const __grid_constant__ Problem p, HeadReport* report) {
  const Sequence s = p.sequence[blockIdx.y];
  __shared__ unsigned long long kept;
  if (threadIdx.x == 0) kept = 0;
  __syncthreads();
  unsigned long long own = 0;
  for (int i = threadIdx.x; i < s.q_blocks; i += kThreads) {
    own += p.count[blockIdx.x * p.rows + s.row_begin + i];
  }
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(~0u, own, step);
  if (threadIdx.x % 32 == 0) atomicAdd(&kept, own);
  __syncthreads();
  if (threadIdx.x != 0) return;
  const double blocks = s.q_blocks;
  const double causal = blocks * s.first_q_block + blocks * (blocks + 1) / 2;
  report[static_cast<int64_t>(blockIdx.y) * p.q_heads + blockIdx.x].density =
      causal > 0 ? static_cast<float>(static_cast<double>(kept) / causal) : 1.0f;
}

// A warp a row; two bytes a block, 34 MB at 128K tokens and 32 heads.
__global__ void __launch_bounds__(kThreads)
    CausalKernel(const __grid_constant__ Problem p, HeadReport* report) {
  AwaitBefore();
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t reports = static_cast<int64_t>(p.sequences) * p.q_heads;
  for (int64_t x = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; x < reports;
       x += static_cast<int64_t>(gridDim.x) * kThreads) {
    report[x] = HeadReport();
  }
  if (task >= p.q_heads * p.rows) return;
  const int64_t row = task % p.rows;
  const Sequence s = p.sequence[SequenceOfRow(p.sequence, p.sequences, row)];
  const int I = s.first_q_block + static_cast<int>(row - s.row_begin);
  WriteCausalRow(I, RowOf(p, task), threadIdx.x % 32, 32);
  if (threadIdx.x % 32 == 0) p.count[task] = I + 1;
}

unsigned RowGrid(const Problem& problem) {
  return static_cast<unsigned>(
      std::max<int64_t>(1, (problem.q_heads * problem.rows + kWarps - 1) / kWarps));
}

}  // namespace

cudaError_t WriteDensity(const Selection& selection, cudaStream_t stream) {
  const Problem& p = selection.problem;
  DensityKernel<<<dim3(p.q_heads, p.sequences), kThreads, 0, stream>>>(p, selection.report);
  return cudaGetLastError();
}

cudaError_t WriteIndex(const Selection& selection, const uint32_t* bitmap, cudaStream_t stream) {
  const Problem& p = selection.problem;
  WriteIndexKernel<<<RowGrid(p), kThreads, 0, stream>>>(p, bitmap, BitmapWords(p));
  return WriteDensity(selection, stream);
}

cudaError_t SelectCausal(const Selection& selection, cudaStream_t stream) {
  const Problem& p = selection.problem;
  LaunchOverlapped(CausalKernel, RowGrid(p), kThreads, stream, p, selection.report);
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
