// What attention_bench needs on the GPU besides the kernels it measures: inputs with the structure
// of real heads, exact attention of sampled rows, and a way to empty L2. Everything is enqueued.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace prefilld::bench {

// Inputs of one sequence, made by a hash of (seed, token, head, channel): no files, no state.
//
// A quarter of the channels, in pairs, turn with the position at wavelengths from 4 to 500,000
// tokens, as RoPE's do: a query that holds the phase of position t - delta scores keys by their
// distance to it, and softmax makes a power law of that, local attention or a band. The other half
// holds directions that chosen keys carry: the sink (the first four tokens), verticals (48 a
// sequence, others for each kv head), and sixteen topics (runs of 256 tokens). Query heads of four
// kinds, by h % 4, ask for
//   0 sink + neighbourhood   1 sink + a band some tokens to some thousands back
//   2 sink + verticals       3 their token's topic + a wide neighbourhood: blocks on no line
// and noise on all. `strength` scales the scores of all of them: 0 is diffuse, 1 like real heads,
// more is sparser.
struct Structure {
  double strength = 1;
  uint32_t seed = 1;
};
cudaError_t FillStructured(const cuda::Problem& problem, const Structure& structure,
                           cudaStream_t stream);
// Normal numbers.
cudaError_t FillRandom(const cuda::Problem& problem, uint32_t seed, cudaStream_t stream);

// Exact attention of queries tokens[count] (rows of q, of one sequence or several), every head, in
// fp32: expected[count, q_heads, d]. Over the rows of the block index, or over all visible keys.
cudaError_t AttendExactly(const cuda::Problem& problem, const int32_t* tokens, int count,
                          bool dense, float* expected, cudaStream_t stream);
// o of the same queries: got[count, q_heads, d].
cudaError_t GatherOutput(const cuda::Problem& problem, const int32_t* tokens, int count, float* got,
                         cudaStream_t stream);

// Reads `bytes` of memory, so that L2 holds nothing else and nothing that must be written back.
cudaError_t ReadThrough(const void* data, size_t bytes, cudaStream_t stream);

}  // namespace prefilld::bench
