// Linear layers through oneDNN (bf16 where the CPU computes in it, else widened to F32 when
// prepared); norm, rope, SwiGLU and conversions through Highway and OpenMP.
#pragma once

#include <memory>

#include "kernels/ops.h"

namespace prefilld::cpu {

// What becomes of BF16 weights. kNative multiplies bf16 x bf16 into F32, and is refused by
// PrepareLinear where the CPU cannot; kWiden keeps a copy in F32.
enum class BF16Weights { kBestForCpu, kWiden };

// The threads of a call are an OpenMP team; oneDNN uses the same.
std::unique_ptr<Ops> CreateOps(int threads, BF16Weights bf16 = BF16Weights::kBestForCpu);

}  // namespace prefilld::cpu
