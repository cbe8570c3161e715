// Random values and their comparison, for the tests of the operations.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/tile.h"
#include "kernels/tensor.h"

namespace prefilld::cpu {

inline std::vector<float> Random(size_t count, unsigned seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// The values in `dtype`, as bytes, and what they are in F32 after that.
inline std::vector<char> Narrowed(std::vector<float>& values, DType dtype) {
  const int64_t count = static_cast<int64_t>(values.size());
  std::vector<char> bytes(count * SizeOf(dtype));
  Narrow(values.data(), count, dtype, bytes.data());
  WidenRows(bytes.data(), dtype, count, 1, static_cast<int>(count), 1, values.data(), count);
  return bytes;
}

inline Rows F32Rows(std::vector<float>& values, int64_t stride) {
  return {values.data(), DType::kF32, stride};
}

// max |got - want| <= bound * max |want|.
inline testing::AssertionResult IsNear(const std::vector<float>& got,
                                       const std::vector<double>& want, double bound) {
  if (got.size() != want.size()) return testing::AssertionFailure() << "sizes differ";
  double scale = 0;
  size_t worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    scale = std::max(scale, std::abs(want[i]));
    if (!(std::abs(got[i] - want[i]) <= std::abs(got[worst] - want[worst]))) worst = i;
  }
  if (got.empty() || std::abs(got[worst] - want[worst]) <= bound * scale) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "worst at " << worst << " of " << got.size() << ": "
                                     << got[worst] << ", not " << want[worst];
}

// The instruction sets of this machine.
inline std::vector<int64_t> Targets() {
  std::vector<int64_t> targets;
  for (int64_t bits = hwy::SupportedTargets(); bits != 0; bits &= bits - 1) {
    const int64_t target = bits & -bits;
    hwy::SetSupportedTargetsForTest(target);
    // A target that was not generated falls back to another one.
    if (std::string(InstructionSet()) == hwy::TargetName(target)) targets.push_back(target);
  }
  hwy::SetSupportedTargetsForTest(0);
  return targets;
}

}  // namespace prefilld::cpu
