// What every launcher of a CUDA kernel takes: plain parameters in, cudaError_t out. No absl, no
// server: the .cc files turn errors into absl::Status. The launchers stand in a header a stage:
// select/selection.h, select/joint/joint.h, select/flexprefill/flexprefill.h, attend/attend.h.
//
// A launcher checks nothing that Supports() has refused, allocates nothing, waits for nothing and
// reads no device memory on the host: every call can be captured in a CUDA graph. Pointers are
// device pointers unless they say host. Lengths are tokens, strides are elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/tensor.h"

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
  DType dtype = DType::kBF16;
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
  // Paged K and V: key t of sequence s is row t % page_tokens of page
  // pages[sequence[s].page_begin + t / page_tokens] of the arena, laid out
  // [page][kv_head][k|v][page_tokens][d]. Null: k and v above.
  const int32_t* pages = nullptr;
  const void* arena = nullptr;
  int64_t arena_pages = 0;
  int page_tokens = 0;   // a power of two, block_size or more: no block lies in two pages
  int page_shift = 0;    // its logarithm
  float* lse = nullptr;  // [q_heads, total_q] natural log, or null
  // The block index (attention.h): count [q_heads, rows], index [q_heads, rows, index_stride].
  int32_t* count = nullptr;
  uint16_t* index = nullptr;
  int64_t index_stride = 0;
};

// Copies the sequences to the device as kernel arguments: nothing on the host has to stay.
cudaError_t WriteSequences(const Sequence* host, int count, Sequence* device, cudaStream_t stream);

}  // namespace prefilld::cuda
