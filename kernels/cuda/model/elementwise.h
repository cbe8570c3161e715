// What a transformer does between its products, as launchers (launch.h has their rules). Rows start
// at 16 bytes and have widths and strides that are multiples of 8; arithmetic is F32, each result
// rounded once to their dtype. All of it is traffic: a kernel reads and writes every row once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace prefilld::cuda {

inline constexpr int kWidthUnit = 8;         // of rows
inline constexpr int kWidthMax = 32 * 1024;  // of what is normalised
inline constexpr int kHeadDimMax = 256;
inline constexpr int kPairsMax = kHeadDimMax / 2;  // that turn

// out[t] = the row of table that ids[t] names; beyond the table, the last.
struct EmbedCall {
  const void* table = nullptr;  // [vocabulary, width] in the dtype of out
  const uint32_t* ids = nullptr;
  int64_t vocabulary = 0, width = 0, tokens = 0;
  Rows out;
};
cudaError_t EmbedRows(const EmbedCall& call, cudaStream_t stream);

// out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight. out may be x.
struct NormCall {
  const float* weight = nullptr;  // [width]
  float eps = 0;
  int64_t width = 0, tokens = 0;
  Rows x, out;
};
cudaError_t NormalizeRows(const NormCall& call, cudaStream_t stream);

// turns[t][i] = cosine and sine of positions[t] * inverse[i], times scale. The frequencies travel
// as an argument.
struct TurnsCall {
  const int32_t* positions = nullptr;
  float inverse[kPairsMax] = {};  // [pairs]
  int pairs = 0;
  float scale = 1;
  int64_t tokens = 0;
  float2* turns = nullptr;  // [tokens, pairs]
};
cudaError_t FillTurns(const TurnsCall& call, cudaStream_t stream);

// From y[t] = (q, k, v), heads side by side, to rows of their own; q and k normalised by head,
// where there is a weight, and turned.
struct SplitQkvCall {
  Rows y;  // [tokens, (q_heads + 2 kv_heads) head_dim]
  Rows q, k, v;
  int q_heads = 0, kv_heads = 0, head_dim = 0;       // at most kHeadDimMax
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim], or null
  float q_eps = 0, k_eps = 0;
  const float2* turns = nullptr;  // [tokens, pairs], of the first token
  int pairs = 0;
  RotaryPairing pairing = RotaryPairing::kHalf;
  int64_t tokens = 0;
};
cudaError_t SplitQkv(const SplitQkvCall& call, cudaStream_t stream);

// out[t] = silu(y[t][0, width)) * y[t][width, 2 width).
struct GateCall {
  Rows y, out;
  int64_t width = 0, tokens = 0;
};
cudaError_t GateRows(const GateCall& call, cudaStream_t stream);

// K and V of a sequence in the form of a KvTarget, one page after the other: [page][K or V of a
// head][page_tokens][head_dim]. Rows of the last page beyond the tokens are not written.
struct PackKvCall {
  Rows k, v;
  int kv_heads = 0, head_dim = 0;
  int64_t tokens = 0;
  int64_t page_tokens = 0, page_stride = 0;   // elements between pages of `out`
  int64_t head_stride = 0, value_stride = 0;  // elements, within a page
  DType dtype = DType::kF32;                  // of `out`
  void* out = nullptr;
};
cudaError_t PackKv(const PackKvCall& call, cudaStream_t stream);

}  // namespace prefilld::cuda
