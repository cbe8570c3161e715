// The vectorised loops of CpuOps besides linear layers: norm, rope, SwiGLU, narrowing. Each works
// on the rows it is given, on the caller's thread. Instruction sets are dispatched at run time
// (Highway).
#pragma once

#include <cstdint>

#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace prefilld::cpu {

inline constexpr int kMaxRopeHeadDim = 256;

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, rows contiguous of `width`. out may be x.
void NormalizeRows(const float* x, const float* weight, float eps, int64_t width, int64_t rows,
                   float* out);

// Rotates tokens [begin, end) of args. head_dim is even and at most kMaxRopeHeadDim.
void RotateTokens(const RopeArgs& args, int64_t begin, int64_t end);

// out = silu(gate) * up. out may be gate.
void MultiplySilu(const float* gate, const float* up, int64_t count, float* out);

// dst[i] = src[i] in `dtype`, to nearest, ties to even; beyond the range to infinity, NaN stays
// NaN.
void Narrow(const float* src, int64_t count, DType dtype, void* dst);

}  // namespace prefilld::cpu
