// The block index: rows of it written by a warp each, and the density of every head from its
// counts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/select/selection.h"

namespace prefilld::cuda {

// density of every head's report, from count; the rest of the report is not touched.
cudaError_t WriteDensity(const Selection& selection, cudaStream_t stream);

#ifdef __CUDACC__
// Writes the blocks set in bits [0, I] of `words` to out, ascending; returns their number. By a
// warp.
__device__ inline int WriteRow(const uint32_t* words, int I, uint16_t* out) {
  const int lane = threadIdx.x % 32;
  int count = 0;
  for (int begin = 0; begin <= I / 32; begin += 32) {
    const int w = begin + lane, filled = min(32, I / 32 + 1 - begin);
    uint32_t own = w <= I / 32 ? words[w] : 0;
    if (w == I / 32) own &= ~0u >> (31 - I % 32);
    int end = __popc(own);  // of this lane's word, once summed over the lanes below
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += below;
    }
    uint16_t* to = out + count;
    const int first = end - __popc(own);
#pragma unroll 4
    for (int at = 0; at < filled; ++at) {
      const uint32_t word = __shfl_sync(~0u, own, at);
      const int word_begin = __shfl_sync(~0u, first, at);
      if (word >> lane & 1) {
        to[word_begin + __popc(word & ((1u << lane) - 1))] =
            static_cast<uint16_t>((begin + at) * 32 + lane);
      }
    }
    count += __shfl_sync(~0u, end, 31);
  }
  return count;
}

// Every causal block of row I. By `threads` threads, of which this is number `thread`.
__device__ inline void WriteCausalRow(int I, uint16_t* out, int thread, int threads) {
  for (int J = thread; J <= I; J += threads) out[J] = static_cast<uint16_t>(J);
}

// Which of the `sequences` sequences row `row` of the block index belongs to.
__device__ inline int SequenceOfRow(const Sequence* sequence, int sequences, int64_t row) {
  int low = 0, high = sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (sequence[middle].row_begin <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}
#endif

}  // namespace prefilld::cuda
