// The queue of stage 3's tasks: their order, and what there is to know of each.
#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/attend/task_queue.h"
#include "kernels/cuda/select/block_index.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 1024;   // rows whose counts differ by less than 0.1% of the longest are equal
constexpr int kClasses = 17;  // of a row: the bits of its count, which is at most 65536
// Up to this much K and V (8K tokens, 8 heads of 128) lie in L2 together whatever runs: then length
// alone decides.
constexpr int64_t kCachedBytes = 36 << 20;
// Beyond so many groups, which all read each other's census, length alone decides as well.
constexpr int64_t kGroupsMax = 1024;
// A row with more than an eighth of what one multiprocessor has to do is long: begun last, it would
// end long after all others.
constexpr int64_t kLongShare = 8;

// The rows of one group: all heads that share a sequence's K and V, or simply all.
struct Group {
  int32_t row_begin, rows, head_begin;
  uint32_t heads;
  uint32_t first;  // its tasks in an order by groups

  __device__ uint32_t tasks() const { return rows * heads; }
  // Neighbours share a row of blocks, and so much of K.
  __device__ int32_t Head(uint32_t i) const { return head_begin + static_cast<int32_t>(i % heads); }
  __device__ int32_t Row(uint32_t i) const { return row_begin + static_cast<int32_t>(i / heads); }
  __device__ int32_t Count(const Problem& p, uint32_t i) const {
    return p.count[Head(i) * p.rows + Row(i)];
  }
};

__device__ Group GroupAt(const Problem& p, int groups) {
  if (groups == 1) {
    return {0, static_cast<int32_t>(p.rows), 0, static_cast<uint32_t>(p.q_heads), 0};
  }
  const Sequence sequence = p.sequence[blockIdx.x / p.kv_heads];
  const int32_t heads = p.q_heads / p.kv_heads;
  const int32_t head_begin = static_cast<int32_t>(blockIdx.x % p.kv_heads) * heads;
  return {sequence.row_begin, sequence.q_blocks, head_begin, static_cast<uint32_t>(heads),
          static_cast<uint32_t>(sequence.row_begin * p.q_heads + head_begin * sequence.q_blocks)};
}

// What a group tells the others.
struct Census {
  unsigned long long blocks;  // of all its rows
  int32_t rows[kClasses];     // of each class
};

__device__ __forceinline__ int ClassOf(int32_t count) { return 31 - __clz(count | 1); }

// One thread block a group; reads 4 bytes a task: 0.13 MB at 128K tokens and 32 heads, 2 us of
// latency.
__global__ void __launch_bounds__(kThreads) CensusKernel(Problem p, Census* census) {
  __shared__ Census own;
  if (threadIdx.x == 0) own.blocks = 0;
  if (threadIdx.x < kClasses) own.rows[threadIdx.x] = 0;
  __syncthreads();
  const Group group = GroupAt(p, gridDim.x);
  for (uint32_t i = threadIdx.x; i < group.tasks(); i += kThreads) {
    const int32_t count = group.Count(p, i);
    atomicAdd(&own.blocks, static_cast<unsigned long long>(count));
    atomicAdd(&own.rows[ClassOf(count)], 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) census[blockIdx.x].blocks = own.blocks;
  if (threadIdx.x < kClasses) census[blockIdx.x].rows[threadIdx.x] = own.rows[threadIdx.x];
}

// A counting sort by length, one thread block a group; a group's tasks are read twice from L2, 5
// us. Within a bin the order is whatever the atomics give: it moves time, never a result.
__global__ void __launch_bounds__(kThreads)
    QueueKernel(Problem p, const Census* census, int multiprocessors, TaskQueue queue) {
  __shared__ int32_t bin_end[kBins];
  __shared__ int32_t warp_sum[32];
  __shared__ unsigned long long all_blocks;
  __shared__ int32_t long_before, long_all;
  const int groups = census == nullptr ? 0 : gridDim.x;  // one group alone is sorted as it is
  const Group group = GroupAt(p, gridDim.x);
  if (threadIdx.x == 0) all_blocks = 0, long_before = long_all = 0;
  if (threadIdx.x == 0 && blockIdx.x == 0) *queue.taken = 0;
  bin_end[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < groups; i += kThreads) atomicAdd(&all_blocks, census[i].blocks);
  __syncthreads();
  const int64_t share = static_cast<int64_t>(all_blocks) / (multiprocessors * kLongShare);
  const int long_class = share < 1 ? kClasses : 32 - __clz(static_cast<int>(min(share, 65535l)));
  for (int i = threadIdx.x; i < groups; i += kThreads) {
    int32_t rows = 0;
    for (int c = long_class; c < kClasses; ++c) rows += census[i].rows[c];
    atomicAdd(&long_all, rows);
    if (i < blockIdx.x) atomicAdd(&long_before, rows);
  }
  const auto bin_of = [&](int64_t count) {  // longest first
    return kBins - 1 - static_cast<int>(count * (kBins - 1) / p.k_blocks_max);
  };
  for (uint32_t i = threadIdx.x; i < group.tasks(); i += kThreads) {
    atomicAdd(&bin_end[bin_of(group.Count(p, i))], 1);
  }
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
  // The long rows of all groups, then the others of all groups.
  int32_t long_own = 0;
  for (int c = long_class; c < kClasses && groups > 0; ++c) long_own += census[blockIdx.x].rows[c];
  for (uint32_t i = threadIdx.x; i < group.tasks(); i += kThreads) {
    QueuedTask task = {group.Head(i), group.Row(i), 0, group.Count(p, i)};
    task.sequence =
        groups > 0 ? blockIdx.x / p.kv_heads : SequenceOfRow(p.sequence, p.sequences, task.row);
    const int32_t at = atomicAdd(&bin_end[bin_of(task.count)], 1);
    queue.task[at < long_own ? long_before + at
                             : long_all + group.first - long_before + at - long_own] = task;
  }
}

static_assert(kThreads == kBins);

// The workspace: tasks [q_heads * rows], a census of each group, the counter of tasks taken.
size_t CensusAt(const Problem& problem) {
  const size_t tasks = static_cast<size_t>(problem.rows) * problem.q_heads * sizeof(QueuedTask);
  return (tasks + 255) / 256 * 256;
}
size_t TakenAt(const Problem& problem) { return CensusAt(problem) + kGroupsMax * sizeof(Census); }

}  // namespace

size_t AttendWorkspace(const Problem& problem) { return TakenAt(problem) + sizeof(int32_t); }

TaskQueue TaskQueueIn(void* workspace, const Problem& problem) {
  char* bytes = static_cast<char*>(workspace);
  return {reinterpret_cast<QueuedTask*>(bytes),
          reinterpret_cast<int32_t*>(bytes + TakenAt(problem))};
}

cudaError_t QueueTasks(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream) {
  const int64_t kv_bytes = 2 * problem.total_k * problem.kv_heads * problem.head_dim *
                           static_cast<int64_t>(SizeOf(problem.dtype));
  const int64_t all_groups = static_cast<int64_t>(problem.sequences) * problem.kv_heads;
  const bool one_group = all_groups > kGroupsMax ||
                         (kv_bytes <= kCachedBytes && problem.rows * problem.q_heads <= 16384);
  const int groups = one_group ? 1 : static_cast<int>(all_groups);
  Census* census = nullptr;
  if (!one_group) {
    census = reinterpret_cast<Census*>(static_cast<char*>(workspace) + CensusAt(problem));
    CensusKernel<<<groups, kThreads, 0, stream>>>(problem, census);
  }
  QueueKernel<<<groups, kThreads, 0, stream>>>(problem, census, multiprocessors,
                                               TaskQueueIn(workspace, problem));
  return cudaGetLastError();
}

}  // namespace prefilld::cuda
