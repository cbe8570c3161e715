// Conversion of values between dtypes in host memory, whatever device computes.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace prefilld {

// dst[i] = src[i] in another dtype for i < count, to nearest, ties to even; beyond the range to
// infinity, NaN stays NaN. Runs on the caller's thread.
struct ConvertArgs {
  const void* src = nullptr;
  DType from = DType::kF32;
  void* dst = nullptr;  // overlaps src nowhere
  DType to = DType::kF32;
  int64_t count = 0;
};
void Convert(const ConvertArgs& args);

}  // namespace prefilld
