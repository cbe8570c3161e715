// The kernel of stage 3: one block of queries of one head over its list of key blocks. Stateless;
// each thread brings its scratch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/tile.h"
#include "kernels/tensor.h"

namespace prefilld::cpu {

inline constexpr int kBlockRowsMax = 128;
// A multiple of the register tile's rows. More rows reuse a panel of keys more often; 48 rows of
// 128 scores are 24 KiB, half of a first-level cache.
inline constexpr int kBandRows = 48;

// What one thread needs.
struct Scratch {
  float* q;       // [kBlockRowsMax, d]
  float* o;       // [kBlockRowsMax, d]
  float* scores;  // [kBandRows, kTileKeys]
  float* max;     // [kBlockRowsMax]
  float* sum;     // [kBlockRowsMax]

  static size_t Floats(int d) {
    return size_t{2} * kBlockRowsMax * d + kBandRows * kTileKeys + 2 * kBlockRowsMax;
  }
  Scratch(float* base, int d)
      : q(base),
        o(q + kBlockRowsMax * d),
        scores(o + kBlockRowsMax * d),
        max(scores + kBandRows * kTileKeys),
        sum(max + kBlockRowsMax) {}
};

// The queries, against the packed keys and values of its kv head.
struct QueryBlock {
  const void* q;  // [rows, d] of dtype
  int64_t q_stride;
  void* o;  // [rows, d] of dtype
  int64_t o_stride;
  float* lse;  // [rows], or null
  DType dtype;
  int rows;
  int d;
  int64_t position;        // absolute, of the first row
  const uint16_t* blocks;  // [count] ascending
  int count;
  int block_size;
  const float* keys;    // [tiles, d, kTileKeys]
  const float* values;  // [keys, d]
  float scale;          // softmax_scale * log2 e
};

// Writes o and lse. A block without keys gives 0 and -infinity.
void AttendBlock(const QueryBlock& block, const Scratch& scratch);

}  // namespace prefilld::cpu
