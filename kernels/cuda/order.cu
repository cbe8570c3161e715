// The order of stage 3's tasks.
#include "kernels/cuda/launch.h"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 1024;  // rows whose counts differ by less than 0.1% of the longest are equal
// Up to this much K and V lie in L2 together whatever runs: then length alone decides.
constexpr int64_t kCachedBytes = 24 << 20;

// A counting sort by length, one thread block a group; a group's tasks are read twice from L2.
// Bytes: 8 a task; 0.3 MB at 128K tokens and 32 heads. What it costs is two passes' latency, 5 us.
// Within a bin the order is whatever the atomics give: it moves time, never a result.
__global__ void __launch_bounds__(kThreads) OrderKernel(Problem p, bool one_group,
                                                        uint32_t* order) {
  __shared__ int32_t bin_end[kBins];
  __shared__ int32_t warp_sum[32];
  const int group_heads = p.q_heads / p.kv_heads;
  int32_t row_begin = 0, rows = static_cast<int32_t>(p.rows), head_begin = 0, heads = p.q_heads;
  if (!one_group) {
    const Sequence sequence = p.sequence[blockIdx.x / p.kv_heads];
    row_begin = sequence.row_begin;
    rows = sequence.q_blocks;
    heads = group_heads;
    head_begin = static_cast<int32_t>(blockIdx.x % p.kv_heads) * group_heads;
  }
  const int64_t tasks = static_cast<int64_t>(rows) * heads;
  order += static_cast<int64_t>(row_begin) * p.q_heads + static_cast<int64_t>(head_begin) * rows;
  const auto task_at = [&](int64_t i) {  // neighbours share a row of blocks, and so much of K
    const int64_t h = head_begin + i % heads, row = row_begin + i / heads;
    return h * p.rows + row;
  };
  const auto bin_of = [&](int64_t task) {  // longest first
    const int64_t count = p.count[task];
    return kBins - 1 - static_cast<int>(count * (kBins - 1) / p.k_blocks_max);
  };

  bin_end[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < tasks; i += kThreads) atomicAdd(&bin_end[bin_of(task_at(i))], 1);
  __syncthreads();
  // Exclusive prefix sums of the bins, one a thread.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t own = bin_end[threadIdx.x];
  int32_t sum = own;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t below = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) warp_sum[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  for (int w = 0; w < warp; ++w) before += warp_sum[w];
  bin_end[threadIdx.x] = before + sum - own;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < tasks; i += kThreads) {
    const int64_t task = task_at(i);
    order[atomicAdd(&bin_end[bin_of(task)], 1)] = static_cast<uint32_t>(task);
  }
}

}  // namespace

static_assert(kThreads == kBins);

cudaError_t OrderTasks(const Problem& problem, uint32_t* order, cudaStream_t stream) {
  const int64_t kv_bytes = 2 * problem.total_k * problem.kv_heads * problem.head_dim *
                           static_cast<int64_t>(SizeOf(problem.dtype));
  const bool one_group = kv_bytes <= kCachedBytes && problem.rows * problem.q_heads <= 16384;
  const int groups = one_group ? 1 : problem.sequences * problem.kv_heads;
  OrderKernel<<<groups, kThreads, 0, stream>>>(problem, one_group, order);
  return cudaGetLastError();
}

size_t AttendWorkspace(const Problem& problem) {
  const size_t order = static_cast<size_t>(problem.rows) * problem.q_heads * sizeof(uint32_t);
  return (order + 255) / 256 * 256 + 256;  // and the counter of tasks taken
}

}  // namespace prefilld::cuda
