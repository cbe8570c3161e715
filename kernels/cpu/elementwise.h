// The vectorised loops of CpuOps besides linear layers: norm, rotation, gate, narrowing. Each works
// on what it is given, on the caller's thread. Instruction sets are dispatched at run time
// (Highway).
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace prefilld::cpu {

inline constexpr int kMaxRotaryDim = 256;

// The team for so many elements: below some, a second thread costs more than it saves.
inline constexpr int64_t kElementsPerThread = 16 * 1024;
inline int ThreadsFor(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, threads));
}

// out = x / sqrt(mean(x^2) + eps) * weight over one row of `width`. out may be x.
struct NormalizeRowArgs {
  const float* x = nullptr;
  const float* weight = nullptr;
  float eps = 0;
  int64_t width = 0;
  float* out = nullptr;
};
void NormalizeRow(const NormalizeRowArgs& args);

// Turns the first rotary_dim channels of each head of one token in place, and scales them.
struct RotateTokenArgs {
  float* x = nullptr;  // [heads, head_dim]
  int heads = 0;
  int head_dim = 0;
  int rotary_dim = 0;  // even, at most head_dim and kMaxRotaryDim
  RotaryPairing pairing = RotaryPairing::kHalf;
  const float* inverse_frequency = nullptr;  // [rotary_dim / 2]
  float scale = 1;
  int32_t position = 0;
};
void RotateToken(const RotateTokenArgs& args);

// out = silu(gate) * up. out may be gate.
void MultiplySilu(const float* gate, const float* up, int64_t count, float* out);

// dst[i] = src[i] in `dtype`, to nearest, ties to even; beyond the range to infinity, NaN stays
// NaN.
void Narrow(const float* src, int64_t count, DType dtype, void* dst);

}  // namespace prefilld::cpu
