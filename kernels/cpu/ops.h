// The operations of kernels/ops.h on the CPU, over rows of F32. Linear layers through oneDNN (bf16
// where the CPU computes in it, else widened to F32 when prepared); norm, rotation, gate and
// conversions through Highway and OpenMP.
#pragma once

#include <memory>

#include "kernels/cpu/linear.h"
#include "kernels/ops.h"

namespace prefilld::cpu {

// The threads of a call are an OpenMP team; oneDNN uses the same.
std::unique_ptr<Ops> CreateOps(int threads, BF16Weights bf16 = BF16Weights::kBestForCpu);

}  // namespace prefilld::cpu
