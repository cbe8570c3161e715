#include "kernels/cpu/tile.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"

namespace prefilld::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> Random(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<int64_t> Targets() {
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

class Tile : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};
INSTANTIATE_TEST_SUITE_P(Every, Tile, testing::ValuesIn(Targets()),
                         [](const auto& target) { return hwy::TargetName(target.param); });

TEST_P(Tile, RunsOnTheInstructionSetItNames) {
  EXPECT_STREQ(InstructionSet(), hwy::TargetName(GetParam()));
}

TEST_P(Tile, WidensEveryDTypeExactly) {
  // 1, -2.5, the least subnormal, the largest finite, infinity, -0.
  const std::vector<uint16_t> f16 = {0x3C00, 0xC100, 0x0001, 0x7BFF, 0x7C00, 0x8000};
  const std::vector<float> f16_wide = {1, -2.5f, std::ldexp(1.0f, -24), 65504, kInfinity, -0.0f};
  const std::vector<uint16_t> bf16 = {0x3F80, 0xC020, 0x0001, 0x7F7F, 0x7F80, 0x8000};
  const std::vector<float> bf16_wide = {
      1, -2.5f, std::ldexp(1.0f, -133), std::ldexp(1.9921875f, 127), kInfinity, -0.0f};
  for (int d : {6, 17, 64}) {
    for (DType dtype : {DType::kF16, DType::kBF16}) {
      const auto& from = dtype == DType::kF16 ? f16 : bf16;
      const auto& want = dtype == DType::kF16 ? f16_wide : bf16_wide;
      std::vector<uint16_t> src(d);
      for (int c = 0; c < d; ++c) src[c] = from[c % 6];
      std::vector<float> dst(d);
      WidenRows(src.data(), dtype, d, 1, d, 1, dst.data(), d);
      for (int c = 0; c < d; ++c) {
        EXPECT_EQ(dst[c], want[c % 6]) << Name(dtype) << " d " << d << " c " << c;
        EXPECT_EQ(std::signbit(dst[c]), std::signbit(want[c % 6]));
      }
    }
  }
}

TEST_P(Tile, WidensStridedRowsAndScales) {
  const std::vector<float> src = Random(5 * 90, 1);
  std::vector<float> dst(5 * 80, 7);
  WidenRows(src.data(), DType::kF32, 90, 5, 70, 0.5f, dst.data(), 80);
  for (int r = 0; r < 5; ++r) {
    for (int c = 0; c < 80; ++c) {
      EXPECT_EQ(dst[r * 80 + c], c < 70 ? src[r * 90 + c] * 0.5f : 7) << r << ", " << c;
    }
  }
}

TEST_P(Tile, PacksKeysTransposedWithZerosBehind) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int keys : {1, 3, 4, 65, 127, 128}) {
      const int d = 66, stride = 70;  // neither a multiple of four channels
      std::vector<float> src = Random(size_t{128} * stride, 2);
      std::vector<uint16_t> narrow(src.size());
      for (size_t i = 0; i < src.size(); ++i) {
        uint32_t bits;
        std::copy_n(reinterpret_cast<const char*>(&src[i]), 4, reinterpret_cast<char*>(&bits));
        narrow[i] = static_cast<uint16_t>(bits >> 16);
        bits &= 0xFFFF0000;
        if (dtype == DType::kBF16) {
          std::copy_n(reinterpret_cast<const char*>(&bits), 4, reinterpret_cast<char*>(&src[i]));
        }
      }
      std::vector<float> dst(size_t{66} * kTileKeys, 7);
      const void* data = dtype == DType::kF32 ? static_cast<const void*>(src.data())
                                              : static_cast<const void*>(narrow.data());
      PackKeysTransposed(data, dtype, stride, keys, d, dst.data());
      for (int c = 0; c < d; ++c) {
        for (int key = 0; key < kTileKeys; ++key) {
          ASSERT_EQ(dst[c * kTileKeys + key], key < keys ? src[key * stride + c] : 0)
              << Name(dtype) << " keys " << keys << " channel " << c << " key " << key;
        }
      }
    }
  }
}

TEST_P(Tile, ScoresAreTheProductForEveryNumberOfRows) {
  const int d = 66, q_stride = 70, scores_stride = 130;
  const std::vector<float> q = Random(size_t{128} * q_stride, 3);
  const std::vector<float> kt = Random(size_t{d} * kTileKeys, 4);
  for (int rows : {1, 2, 3, 4, 5, 6, 7, 12, 128}) {
    std::vector<float> scores(static_cast<size_t>(rows + 1) * scores_stride, 7);
    ScoreTile(q.data(), q_stride, rows, kt.data(), d, scores.data(), scores_stride);
    for (int r = 0; r <= rows; ++r) {
      for (int key = 0; key < scores_stride; ++key) {
        double want = 7;  // beyond the tile nothing is written
        if (r < rows && key < kTileKeys) {
          want = 0;
          for (int c = 0; c < d; ++c) want += double{q[r * q_stride + c]} * kt[c * kTileKeys + key];
        }
        ASSERT_NEAR(scores[r * scores_stride + key], want, 2e-5) << r << ", " << key;
      }
    }
  }
}

TEST_P(Tile, RowMaxFindsTheLargestAnywhere) {
  for (int n : {1, 2, 15, 16, 17, 100, 128}) {
    for (int at = 0; at < n; ++at) {
      std::vector<float> row = Random(n, 5);
      for (float& x : row) x = -1 - std::abs(x);
      row[at] = -0.5f;
      ASSERT_EQ(RowMax(row.data(), n), -0.5f) << n << " at " << at;
    }
  }
}

TEST_P(Tile, ExpIsWithinTwoInTenMillionOfTheTruth) {
  double worst = 0, worst_at = 0;
  std::vector<float> row(1000);
  for (int part = 0; part < 100; ++part) {
    for (int i = 0; i < 1000; ++i) row[i] = -87 * static_cast<float>(part * 1000 + i) / 100000;
    const std::vector<float> x = row;
    ExpRowInPlace(row.data(), 1000, 0);
    for (int i = 0; i < 1000; ++i) {
      const double error = std::abs(row[i] / std::exp(double{x[i]}) - 1);
      if (!(error <= worst)) worst = error, worst_at = x[i];
    }
  }
  EXPECT_LE(worst, 2e-7) << "at " << worst_at;
}

TEST_P(Tile, ExpIsExactAtZeroAndZeroFarBelow) {
  std::vector<float> row = {3, 3 - 87.5f, -kInfinity, -1e30f, 3};
  EXPECT_EQ(ExpRowInPlace(row.data(), 5, 3), 2);
  EXPECT_EQ(row, (std::vector<float>{1, 0, 0, 0, 1}));
}

TEST_P(Tile, ExpKeepsNaN) {
  std::vector<float> row(40, -1.0f);
  row[20] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(ExpRowInPlace(row.data(), 40, 0)));
  EXPECT_TRUE(std::isnan(row[20]));
}

TEST_P(Tile, ExpSumsOnlyTheRow) {
  for (int n : {1, 7, 16, 33, 128}) {
    std::vector<float> row = Random(n + 1, 6);
    double want = 0;
    for (int i = 0; i < n; ++i) want += std::exp(double{row[i]} - 5);
    const float behind = row[n];
    EXPECT_NEAR(ExpRowInPlace(row.data(), n, 5), want, want * 1e-6);
    EXPECT_EQ(row[n], behind);
  }
}

}  // namespace
}  // namespace prefilld::cpu
