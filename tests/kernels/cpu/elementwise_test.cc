#include "kernels/cpu/elementwise.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/cpu/tile.h"
#include "tests/kernels/cpu/numbers.h"

namespace prefilld::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Every test on every instruction set of this machine.
class Elementwise : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }
};
INSTANTIATE_TEST_SUITE_P(Every, Elementwise, testing::ValuesIn(Targets()),
                         [](const auto& target) { return hwy::TargetName(target.param); });

TEST_P(Elementwise, NormDividesByTheRootMeanSquare) {
  for (int64_t width : {1, 7, 64, 576, 1001}) {
    const std::vector<float> x = Random(width, 1, 3), weight = Random(width, 2);
    std::vector<float> out(x.size());
    NormalizeRow({x.data(), weight.data(), 1e-5f, width, out.data()});
    double squares = 0;
    for (const float value : x) squares += std::pow(double{value}, 2);
    const double scale = 1 / std::sqrt(squares / width + double{1e-5f});
    std::vector<double> want;
    for (int64_t i = 0; i < width; ++i) want.push_back(x[i] * scale * weight[i]);
    EXPECT_TRUE(IsNear(out, want, 1e-6)) << width;
    std::vector<float> in_place = x;
    NormalizeRow({in_place.data(), weight.data(), 1e-5f, width, in_place.data()});
    EXPECT_EQ(in_place, out) << width;
  }
}

TEST_P(Elementwise, NormOfZerosIsZero) {
  std::vector<float> x(64, 0.0f), weight(64, 1.0f);
  NormalizeRow({x.data(), weight.data(), 1e-6f, 64, x.data()});
  EXPECT_EQ(x, std::vector<float>(64, 0.0f));
}

// Against the formula in double, all of a head and part of it, in both pairings.
TEST_P(Elementwise, RotationTurnsPairsByPositionTimesFrequency) {
  constexpr int kHeads = 3;
  struct Case {
    int head_dim, rotary_dim;
  };
  for (const auto [head_dim, rotary_dim] : std::vector<Case>{{2, 2},
                                                             {6, 6},
                                                             {64, 64},
                                                             {96, 96},
                                                             {128, 128},
                                                             {256, 256},
                                                             {6, 2},
                                                             {64, 32},
                                                             {96, 48},
                                                             {128, 64},
                                                             {128, 34},
                                                             {256, 64}}) {
    std::vector<float> frequency(rotary_dim / 2);
    for (int i = 0; i < rotary_dim / 2; ++i) {
      frequency[i] = 1.0f / std::pow(10000.0f, 2.0f * i / rotary_dim);
    }
    for (const RotaryPairing pairing : {RotaryPairing::kHalf, RotaryPairing::kInterleaved}) {
      for (const int32_t position : {0, 1, 2, 3, 127, 8191, 131071, 1 << 20, (1 << 24) - 1}) {
        const std::vector<float> x = Random(kHeads * head_dim + 5, position + 7);
        std::vector<float> got = x;
        RotateToken({.x = got.data(),
                     .heads = kHeads,
                     .head_dim = head_dim,
                     .rotary_dim = rotary_dim,
                     .pairing = pairing,
                     .inverse_frequency = frequency.data(),
                     .position = position});
        std::vector<double> want(x.begin(), x.end());
        for (int h = 0; h < kHeads; ++h) {
          for (int i = 0; i < rotary_dim / 2; ++i) {
            const double angle = static_cast<float>(position) * frequency[i];  // rounded to F32
            const bool halves = pairing == RotaryPairing::kHalf;
            const int low = h * head_dim + (halves ? i : 2 * i);
            const int high = low + (halves ? rotary_dim / 2 : 1);
            want[low] = x[low] * std::cos(angle) - x[high] * std::sin(angle);
            want[high] = x[high] * std::cos(angle) + x[low] * std::sin(angle);
          }
        }
        EXPECT_TRUE(IsNear(got, want, 2e-7))
            << rotary_dim << " of " << head_dim << " at " << position
            << (pairing == RotaryPairing::kHalf ? " halves" : " interleaved");
        for (int h = 0; h < kHeads; ++h) {
          for (int i = h * head_dim + rotary_dim; i < (h + 1) * head_dim; ++i) {
            ASSERT_EQ(got[i], x[i]) << "channel " << i << " does not turn";
          }
        }
      }
    }
  }
}

TEST_P(Elementwise, GateIsSiluTimesUp) {
  std::vector<float> gate = Random(100'003, 1, 5), up = Random(gate.size(), 2);
  const std::vector<float> extremes = {-1e30f, -104, -88, -87, 0, -0.0f, 88, 1e30f};
  std::copy(extremes.begin(), extremes.end(), gate.begin());
  std::fill_n(up.begin(), extremes.size(), 1.0f);
  std::vector<float> out(gate.size());
  const int64_t count = static_cast<int64_t>(gate.size());
  MultiplySilu(gate.data(), up.data(), count, out.data());
  for (size_t i = 0; i < gate.size(); ++i) {
    const double want = gate[i] / (1 + std::exp(-double{gate[i]})) * up[i];
    ASSERT_NEAR(out[i], want, 5e-7 * std::abs(want) + 1e-7 * (gate[i] < -80))
        << i << ": " << gate[i];
  }
  MultiplySilu(gate.data(), up.data(), count, gate.data());
  EXPECT_EQ(gate, out);
  const float nan = NAN, one = 1;
  float result = 0;
  MultiplySilu(&nan, &one, 1, &result);
  EXPECT_TRUE(std::isnan(result));
}

// Every value of a half type with its neighbours in F32, and the ties between it and the next.
TEST_P(Elementwise, NarrowRoundsToNearestEven) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    const uint16_t infinity = dtype == DType::kBF16 ? 0x7F80 : 0x7C00;
    std::vector<uint16_t> halves(infinity + 1);
    for (size_t h = 0; h < halves.size(); ++h) halves[h] = static_cast<uint16_t>(h);
    const int count = static_cast<int>(halves.size());
    std::vector<float> wide(count);
    WidenRows(halves.data(), dtype, count, 1, count, 1, wide.data(), count);
    // Rounding sees what lies past the largest finite value as one more step.
    const double last_step = double{wide[count - 2]} - wide[count - 3];

    std::vector<float> values;
    std::vector<uint16_t> want;
    const auto expect = [&](double value, int half) {
      for (uint16_t sign : {0x0000, 0x8000}) {
        values.push_back(static_cast<float>(sign == 0 ? value : -value));
        want.push_back(static_cast<uint16_t>(half | sign));
      }
    };
    for (int h = 0; h + 1 < count; ++h) {
      const double next = h + 2 < count ? double{wide[h + 1]} : wide[h] + last_step;
      const double tie = (wide[h] + next) / 2;
      expect(wide[h], h);
      // BF16 subnormals have no F32 between them and their ties to round to.
      if (static_cast<double>(static_cast<float>(tie)) != tie) continue;
      expect(tie, h % 2 == 0 ? h : h + 1);
      expect(std::nextafter(static_cast<float>(tie), 0.0f), h);
      expect(std::nextafter(static_cast<float>(tie), kInfinity), h + 1);
    }
    expect(kInfinity, infinity);
    expect(std::numeric_limits<float>::max(), infinity);

    std::vector<uint16_t> got(values.size());
    Narrow(values.data(), static_cast<int64_t>(values.size()), dtype, got.data());
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i], want[i]) << Name(dtype) << " of " << std::hexfloat << values[i];
    }
  }
}

TEST_P(Elementwise, NarrowKeepsNanNan) {
  for (uint32_t bits : {0x7F800001u, 0x7FC00000u, 0xFFFFFFFFu}) {
    const float nan = std::bit_cast<float>(bits);
    uint16_t bf16 = 0, f16 = 0;
    Narrow(&nan, 1, DType::kBF16, &bf16);
    Narrow(&nan, 1, DType::kF16, &f16);
    EXPECT_GT(bf16 & 0x7FFF, 0x7F80) << bits;
    EXPECT_GT(f16 & 0x7FFF, 0x7C00) << bits;
  }
}

}  // namespace
}  // namespace prefilld::cpu
