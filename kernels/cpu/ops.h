// Linear layers through oneDNN (bf16 where the CPU computes in it, else widened to F32 when
// prepared); norm, rope, SwiGLU and conversions through Highway and OpenMP.
#pragma once

#include <memory>

#include "kernels/ops.h"

namespace prefilld::cpu {

std::unique_ptr<Ops> CreateOps(int threads);

}  // namespace prefilld::cpu
