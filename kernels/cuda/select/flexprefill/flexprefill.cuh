// What the kernels of FlexPrefill (kernels/cpu/flexprefill.h says what it computes) share: the
// workspace, the decisions of a head, and the rules that are functions of numbers alone.
//
// Masses are held times 2^40. The smallest probability that the method counts as more than zero,
// e^-87, divided by a sum over a million keys and by the rows, is no normal float; times 2^40 it
// is. So an exact zero is a zero of the algorithm, on which its pattern test depends, and nothing
// else.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/select/flexprefill/flexprefill.h"

namespace prefilld::cuda {

constexpr float kMassScale = 0x1p40f;

// Of all kernels of the method, with PlainTable: those that are no templates take any dtype and
// any multiple of 8 up to 256.
using FlexPrefillTable = KernelTable<64, 96, 128, 256>;
// 1 / sqrt: a constant for each of them.
__host__ __device__ constexpr double InverseRoot(int head_dim) {
  return head_dim == 64    ? 0.125
         : head_dim == 96  ? 0.10206207261596575409
         : head_dim == 128 ? 0.08838834764831844055
         : head_dim == 256 ? 0.0625
                           : 1 / sqrt(static_cast<double>(head_dim));  // no constant
}

// What is decided for a head of a sequence.
struct LineBudget {
  int32_t vertical, diagonal;  // blocks, before the pattern has its say
  int32_t query_aware;         // 0 or 1
};

// By value into kernels. Sequences have as many queries as keys, so "rows" counts key blocks as
// well: block J of sequence s stands at s.row_begin + J, its tokens at block_size times that.
struct FlexPrefill {
  Problem problem;
  HeadReport* report;
  double gamma, tau;
  int32_t least_blocks, most_blocks;  // min_budget and max_budget

  // The softmax of the last rows, in pieces: maximum and sum over a chunk of the keys.
  float2* row_sums;              // [sequences, q_heads, chunks, block_size]
  int32_t chunk_blocks, chunks;  // key blocks of a chunk, chunks of the longest sequence
  // Mean of the valid keys of a block, never rounded.
  float* key_mean;  // [kv_heads, rows, head_dim]
  // a_v by token j. a_s by i = S - 1 - delta, in two addends: what key block i / B gives, and what
  // the block before gives (stored there, at i - B).
  float *vertical, *diagonal, *diagonal_next;  // [q_heads, rows * block_size]
  // Their sums over blocks.
  float *block_vertical, *block_diagonal, *block_diagonal_next;  // [q_heads, rows]
  float* pooled_probe;  // [q_heads, rows] logits of the pattern test
  LineBudget* budget;   // [sequences, q_heads]
  // Of query-aware heads, some at a time; in the place of the lines, which are done with by then.
  float* pooled_map;
  uint32_t* bitmap;  // [q_heads, rows, BitmapWords]

  __host__ __device__ int64_t Tokens() const { return problem.rows * problem.block_size; }
  __host__ __device__ int64_t Words() const { return (problem.k_blocks_max + 31) / 32; }
  // S <= max(2 B, least B): such a sequence runs dense.
  __host__ __device__ bool IsShort(const Sequence& s) const {
    return s.sk <= 2 * problem.block_size || s.k_blocks <= least_blocks;
  }
};

// Room for pooled maps, n (n + 1) / 2 floats a head; but always for one.
constexpr int64_t kPooledMapBytes = int64_t{512} << 20;
// Chunks of a sequence's keys: enough to occupy a device, few enough to be added up by every thread
// block of the second pass.
inline int MaxChunks(const Problem& p) {
  return static_cast<int>(
      std::clamp<int64_t>(512 / (static_cast<int64_t>(p.sequences) * p.kv_heads), 1, 64));
}

inline int64_t TriangleSize(int64_t n) { return n * (n + 1) / 2; }

// How the blocks of all sequences are cut into chunks, one thread block each.
struct ChunkPlan {
  int32_t blocks;  // of a chunk
  int32_t chunks;  // of the longest sequence
  double time;     // in blocks of one thread block
};
// `unit` key blocks are taken together; `lanes` thread blocks share each chunk of keys.
ChunkPlan PlanChunks(const Problem& problem, int unit, int64_t lanes, int multiprocessors);

// The most shared memory that a thread block can have here.
int SharedMemoryLimit();

// The kernels, in this order. The first three are the estimate; the first sets f->chunks.
cudaError_t FlexPrefillRowSums(FlexPrefill* f, int multiprocessors, cudaStream_t stream);
cudaError_t FlexPrefillLines(const FlexPrefill& f, int multiprocessors, cudaStream_t stream);
cudaError_t FlexPrefillBudgets(const FlexPrefill& f, int multiprocessors, cudaStream_t stream);
cudaError_t FlexPrefillChoose(const FlexPrefill& f, cudaStream_t stream);
cudaError_t FlexPrefillQueryAware(const FlexPrefill& f, cudaStream_t stream);
// What the first two launch for F32.
cudaError_t FlexPrefillRowSumsF32(FlexPrefill* f, int multiprocessors, cudaStream_t stream);
cudaError_t FlexPrefillLinesF32(const FlexPrefill& f, cudaStream_t stream);

}  // namespace prefilld::cuda
