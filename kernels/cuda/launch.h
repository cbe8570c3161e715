// The launchers of the CUDA kernels: plain parameters in, cudaError_t out. No absl, no server:
// every .cu file includes this, and the .cc beside them turns errors into absl::Status.
//
// A launcher checks nothing that Supports() has refused, allocates nothing, waits for nothing and
// reads no device memory on the host: every call can be captured in a CUDA graph. Pointers are
// device pointers unless they say host. Lengths are tokens, strides are elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::cuda {

// One sequence of a ragged batch (SequenceBlocks in 32 bits), on the host and on the device.
struct Sequence {
  int32_t q_begin, k_begin;  // first row of this sequence in q, in k
  int32_t sq, sk;            // tokens
  int32_t prefix;            // sk - sq
  int32_t first_q_block;     // absolute number of the first query block
  int32_t q_blocks, k_blocks;
  int32_t row_begin;   // first row of this sequence in the block index
  int32_t page_begin;  // first entry of this sequence in Problem::pages
};

// A [tokens, heads, d] tensor; channels contiguous, data 16-byte aligned, strides multiples of 8.
struct Tensor {
  void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// What is attended to. By value into kernels.
struct Problem {
  DType dtype = DType::kBF16;  // kBF16, kF16
  int q_heads = 0, kv_heads = 0, head_dim = 0;
  int block_size = 128;  // 64, 128
  int sequences = 0;
  int64_t total_q = 0, total_k = 0;
  int64_t rows = 0;          // rows of blocks of all sequences
  int32_t q_blocks_max = 0;  // of one sequence
  int32_t k_blocks_max = 0;  // of one sequence
  int32_t sq_max = 0, sk_max = 0;
  const Sequence* sequence = nullptr;       // [sequences], device
  const Sequence* host_sequence = nullptr;  // [sequences], host: for grids, not for kernels
  float softmax_scale = 0;
  Tensor q, k, v, o;  // k and v are not read where pages is set
  // Paged K and V: block J of sequence s is page pages[sequence[s].page_begin + J] of the arena,
  // laid out [page][kv_head][k|v][block_size][d]. Null: k and v above.
  const int32_t* pages = nullptr;
  const void* arena = nullptr;
  int64_t arena_pages = 0;
  float* lse = nullptr;  // [q_heads, total_q] natural log, or null
  // The block index (attention.h): count [q_heads, rows], index [q_heads, rows, index_stride].
  int32_t* count = nullptr;
  uint16_t* index = nullptr;
  int64_t index_stride = 0;
};

// Copies the sequences to the device as kernel arguments: nothing on the host has to stay.
cudaError_t WriteSequences(const Sequence* host, int count, Sequence* device, cudaStream_t stream);

// ---- Stages 1 and 2 -------------------------------------------------------------------------
struct Selection {
  Problem problem;
  double gamma = 0.9, tau = 0.1;
  int64_t min_budget_tokens = 0, max_budget_tokens = INT64_MAX;
  void* workspace = nullptr;     // 256-byte aligned, of the size that the layout says
  HeadReport* report = nullptr;  // [sequences, q_heads]; device or mapped host memory
};

// Bytes of workspace that Estimate, Select and MeasureCapturedMass of a method share.
size_t JointWorkspace(const Problem& problem);
cudaError_t JointEstimate(const Selection& selection, int multiprocessors, cudaStream_t stream);
cudaError_t JointSelect(const Selection& selection, int multiprocessors, cudaStream_t stream);

size_t FlexPrefillWorkspace(const Problem& problem);
cudaError_t FlexPrefillEstimate(const Selection& selection, int multiprocessors,
                                cudaStream_t stream);
cudaError_t FlexPrefillSelect(const Selection& selection, int multiprocessors, cudaStream_t stream);

// Every causal block, for method dense: count, index and report.
cudaError_t SelectCausal(const Selection& selection, cudaStream_t stream);

// Captured mass of every head on its own sampled rows (docs/sparse-attention.md, section 4); heads
// whose mean is below min_captured_mass get every causal block. Reads count and index.
size_t CapturedMassWorkspace(const Problem& problem);
cudaError_t MeasureCapturedMass(const Selection& selection, double min_captured_mass,
                                int multiprocessors, cudaStream_t stream);

// From a bitmap of kept blocks [q_heads, rows, bitmap_words(problem)] (bit J of a row: keep block
// J; only J <= I are set) to count, index, and the density in the report. `pattern` and
// dense_reason of the report are the method's.
inline int64_t BitmapWords(const Problem& problem) { return (problem.k_blocks_max + 31) / 32; }
cudaError_t WriteIndex(const Selection& selection, const uint32_t* bitmap, cudaStream_t stream);

// ---- Stage 3 ----------------------------------------------------------------------------------
// Both write o and lse of every query, read nothing of the method but count and index, and each
// gives the same bits for the same input every time. A row without a block gets 0 and -infinity.
// The workspace is 16-byte aligned.
size_t AttendWorkspace(const Problem& problem);
cudaError_t AttendSm90(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream);
cudaError_t AttendSm80(const Problem& problem, void* workspace, int multiprocessors,
                       cudaStream_t stream);
// What has a kernel: the table that Supports() asks and the launchers choose from.
bool HasAttendSm90(DType dtype, int head_dim, int block_size);
bool HasAttendSm80(DType dtype, int head_dim, int block_size);

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
cudaError_t QueueTasks(const Problem& problem, void* workspace, cudaStream_t stream);

}  // namespace prefilld::cuda
