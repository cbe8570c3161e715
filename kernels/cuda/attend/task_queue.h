// The order in which stage 3 takes its tasks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace prefilld::cuda {

// One task of stage 3: a row of blocks of a query head.
struct alignas(16) QueuedTask {
  int32_t head, row;  // of the block index
  int32_t sequence;
  int32_t count;  // blocks of keys
};
struct TaskQueue {
  QueuedTask* task;  // [q_heads * rows]
  int32_t* taken;    // a counter for those who take them, zero at first
};
// Where it lies in the workspace of stage 3.
TaskQueue TaskQueueIn(void* workspace, const Problem& problem);
// Fills it in the order in which stage 3 takes its tasks: first the rows that are long beside what
// one multiprocessor has to do, then the others, grouped by (sequence, kv head) so that what runs
// together shares K and V in L2, within a group the longest rows first. Called by AttendSm80 and
// AttendSm90.
cudaError_t QueueTasks(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream);

}  // namespace prefilld::cuda
