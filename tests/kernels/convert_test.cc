#include "kernels/convert.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace prefilld {
namespace {

std::vector<uint16_t> FromF32(const std::vector<float>& values, DType to) {
  std::vector<uint16_t> out(values.size() + 1, 0xABCD);
  Convert({.src = values.data(),
           .from = DType::kF32,
           .dst = out.data(),
           .to = to,
           .count = static_cast<int64_t>(values.size())});
  EXPECT_EQ(out.back(), 0xABCD) << "written beyond the end";
  out.pop_back();
  return out;
}

TEST(Convert, RoundsToNearestEven) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(FromF32({1, 1.00390625f, 1.01171875f, 1.0039064f, -inf, 3.4e38f}, DType::kBF16),
            (std::vector<uint16_t>{0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xFF80, 0x7F80}));
  EXPECT_EQ(FromF32({1, 1.00048828125f, 1.00146484375f, 65504, 65520, -0.0f}, DType::kF16),
            (std::vector<uint16_t>{0x3C00, 0x3C00, 0x3C02, 0x7BFF, 0x7C00, 0x8000}));
  EXPECT_GT(FromF32({std::nanf("")}, DType::kBF16)[0] & 0x7FFF, 0x7F80);
  EXPECT_GT(FromF32({std::nanf("")}, DType::kF16)[0] & 0x7FFF, 0x7C00);
}

// Longer than what is converted at a time; every finite value comes back from F32 as it was.
TEST(Convert, OfHalvesToF32AndBackIsTheSame) {
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    std::vector<uint16_t> halves;
    for (int h = 0; h < (dtype == DType::kBF16 ? 0x7F80 : 0x7C00); ++h) {
      halves.push_back(static_cast<uint16_t>(h));
      halves.push_back(static_cast<uint16_t>(h | 0x8000));
    }
    const int64_t count = static_cast<int64_t>(halves.size());
    std::vector<float> wide(halves.size());
    Convert({.src = halves.data(), .from = dtype, .dst = wide.data(), .count = count});
    EXPECT_EQ(FromF32(wide, dtype), halves) << Name(dtype);
  }
}

TEST(Convert, FromOneHalfTypeToTheOther) {
  const std::vector<uint16_t> bf16 = {0x3F80, 0x3F81, 0x7F7F, 0xC2C8};
  std::vector<uint16_t> f16(bf16.size());
  Convert({.src = bf16.data(),
           .from = DType::kBF16,
           .dst = f16.data(),
           .to = DType::kF16,
           .count = static_cast<int64_t>(f16.size())});
  EXPECT_EQ(f16, (std::vector<uint16_t>{0x3C00, 0x3C08, 0x7C00, 0xD640}));
}

}  // namespace
}  // namespace prefilld
