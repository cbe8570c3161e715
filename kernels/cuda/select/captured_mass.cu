// Captured mass: the probe on rows of its own, and the share of it that lies in kept blocks.
#include "kernels/cuda/instructions/arithmetic.cuh"
#include "kernels/cuda/select/block_index.cuh"
#include "kernels/cuda/select/probe.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// A thread block a head of a sequence, a warp a row: its total over the blocks that it sees, then
// its kept blocks. Bytes: 8 a (row, block) and the 64 rows of the index, 10 MB at 128K tokens; one
// round trip to L2 after the other makes it 10 us.
__global__ void __launch_bounds__(kThreads)
    CapturedKernel(const __grid_constant__ Problem p, const BlockPart* parts, int64_t slots,
                   double min_captured_mass, HeadReport* report) {
  __shared__ double share[kProbeRows];
  __shared__ bool everything;
  const int h = blockIdx.x, lane = threadIdx.x % 32;
  const Sequence s = p.sequence[blockIdx.y];
  const int rows = ProbeRowCount(s);
  const int64_t first_row = h * p.rows + s.row_begin;
  for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
    const int I = (s.prefix + ProbeRow(RowRule::kMeasure, r, s.sq)) / p.block_size;
    const BlockPart* row = parts + (static_cast<int64_t>(h) * kProbeRows + r) * slots +
                           FirstBlock(s, blockIdx.y, p.block_size);
    float largest = -INFINITY;
    for (int J = lane; J <= I; J += 32) largest = fmaxf(largest, row[J].x);
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    }
    // A row that holds NaN or infinity has no mass anywhere.
    const auto mass = [&](int J) {
      const BlockPart part = row[J];
      return part.y == 0 ? 0.0f : part.y * exp2f(part.x - largest);
    };
    double total = 0, kept = 0;
    for (int J = lane; J <= I; J += 32) total += mass(J);
    const int64_t task = first_row + I - s.first_q_block;
    const uint16_t* index = p.index + task * p.index_stride;
    for (int x = lane; x < p.count[task]; x += 32) kept += mass(index[x]);
    total = WarpSum(total);
    kept = WarpSum(kept);
    if (lane == 0) share[r] = isfinite(total) && total > 0 ? kept / total : 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0, least = 1;
    for (int r = 0; r < rows; ++r) {
      sum += share[r];
      least = fmin(least, share[r]);
    }
    const double mean = rows == 0 ? 1 : sum / rows;
    HeadReport& head = report[static_cast<int64_t>(blockIdx.y) * p.q_heads + h];
    everything = mean < min_captured_mass && head.pattern != Pattern::kDense;
    if (everything) {
      head = {.pattern = Pattern::kDense, .dense_reason = DenseReason::kMinCapturedMass};
    } else {
      head.captured_mass = static_cast<float>(mean);
      head.captured_mass_min = static_cast<float>(least);
    }
  }
  __syncthreads();
  if (!everything) return;
  for (int i = threadIdx.x / 32; i < s.q_blocks; i += kWarps) {
    WriteCausalRow(s.first_q_block + i, p.index + (first_row + i) * p.index_stride, lane, 32);
    if (lane == 0) p.count[first_row + i] = s.first_q_block + i + 1;
  }
}

}  // namespace

bool HasCapturedMass(DType dtype, int head_dim) { return HasProbe(dtype, head_dim); }

size_t CapturedMassWorkspace(const Problem& problem) { return ProbeBytes(problem); }

cudaError_t MeasureCapturedMass(const Selection& selection, double min_captured_mass,
                                int multiprocessors, cudaStream_t stream) {
  const Problem& p = selection.problem;
  BlockPart* parts = static_cast<BlockPart*>(selection.workspace);
  const cudaError_t error = Probe(p, RowRule::kMeasure, parts, nullptr, multiprocessors, stream);
  if (error != cudaSuccess) return error;
  CapturedKernel<<<dim3(p.q_heads, p.sequences), kThreads, 0, stream>>>(
      p, parts, BlockSlots(p), min_captured_mass, selection.report);
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
