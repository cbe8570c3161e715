// The vectorised pieces that attention and selection share: packing of keys, tiles of scores, rows
// of exponentials. Everything computes in F32 whatever the input dtype. Instruction sets are
// dispatched at run time (Highway). Stateless; any thread.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace prefilld::cpu {

inline constexpr int kTileKeys = 128;  // columns of a packed key tile: one KV block

// dst[rows, d] = widen(src rows), times `scale`. src points at [row 0, channel 0]; strides in
// elements.
void WidenRows(const void* src, DType dtype, int64_t row_stride, int64_t rows, int d, float scale,
               float* dst, int64_t dst_stride);

// Packs `keys` <= kTileKeys rows [keys, d] transposed: dst[d][kTileKeys], missing columns zero.
void PackKeysTransposed(const void* src, DType dtype, int64_t row_stride, int keys, int d,
                        float* dst);

// scores[rows][kTileKeys] = q[rows, d] . kt[d][kTileKeys]. scores_stride >= kTileKeys.
void ScoreTile(const float* q, int64_t q_stride, int rows, const float* kt, int d, float* scores,
               int64_t scores_stride);

// max over row[0, n), n >= 1.
float RowMax(const float* row, int n);

// row[i] = exp(row[i] - shift) for i < n; returns their sum. exp(0) is exactly 1; arguments of
// -infinity and below -87 give 0.
float ExpRowInPlace(float* row, int n, float shift);

// The instruction set in use, for logs: "AVX3_ZEN4", "AVX2", ...
const char* InstructionSet();

}  // namespace prefilld::cpu
