// The exact softmax mass of every block of keys in 64 rows of queries of each head: what joint
// chooses its lines from, and how captured mass is measured.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace prefilld::cuda {

constexpr int kProbeRows = 64;

// Which rows are probed (docs/sparse-attention.md, sections 3 and 4).
enum class RowRule { kProbe, kMeasure };

// Rows of a sequence: all where it has no more than 64, else one in each of 64 equal strata.
__host__ __device__ inline int ProbeRowCount(const Sequence& s) {
  return s.sq < kProbeRows ? s.sq : kProbeRows;
}
#ifdef __CUDACC__
// Query token of row r, ascending in r.
__device__ inline int ProbeRow(RowRule rule, int r, int sq) {
  if (sq <= kProbeRows) return r;
  const int inverse = static_cast<int>(__brev(static_cast<unsigned>(r)) >> 26);  // in 64ths
  const int64_t in_64ths = rule == RowRule::kProbe ? inverse : kProbeRows - inverse;
  const int64_t t = (int64_t{kProbeRows} * r + in_64ths) * sq / (kProbeRows * kProbeRows);
  return static_cast<int>(t < sq ? t : sq - 1);
}
#endif

// Where blocks of keys of all sequences lie one after the other: from FirstBlock(s) on there is
// room for the k_blocks of sequence s, and for BlockSlots() in all.
__host__ __device__ inline int64_t FirstBlock(const Sequence& s, int64_t number, int block_size) {
  return s.k_begin / block_size + number;
}
inline int64_t BlockSlots(const Problem& problem) {
  return problem.total_k / problem.block_size + problem.sequences;
}

// One row and block: the largest logit in units of ln 2, and the sum of 2^(logit - largest).
using BlockPart = float2;
// Those of row r of head h of a sequence: parts + ((h * 64 + r) * slots + FirstBlock) [k_blocks].
// Written for the blocks that the row sees, J <= its own.
inline size_t ProbeBytes(const Problem& problem) {
  return static_cast<size_t>(problem.q_heads) * kProbeRows * BlockSlots(problem) *
         sizeof(BlockPart);
}

constexpr int kPool = 32;  // tokens of a pool: 16 choose a little better, 64 worse
// Mean keys of pools of 32 tokens, [kv_heads][slots * block_size / 32][head_dim], in FP16 and less
// the mean of one of them, in the middle of the sequence; those of F32 in F32, as they are.
inline size_t PooledKeyBytes(const Problem& problem) {
  return static_cast<size_t>(problem.kv_heads) * BlockSlots(problem) *
         (problem.block_size / kPool) * problem.head_dim * SizeOf(problem.dtype);
}

bool HasProbe(DType dtype, int head_dim);
// One pass over K. Writes parts, and pools of keys where `pools` is not null.
cudaError_t Probe(const Problem& problem, RowRule rule, BlockPart* parts, void* pools,
                  int multiprocessors, cudaStream_t stream);
// What it launches for F32.
cudaError_t ProbeF32(const Problem& problem, RowRule rule, BlockPart* parts, void* pools,
                     int multiprocessors, cudaStream_t stream);

}  // namespace prefilld::cuda
