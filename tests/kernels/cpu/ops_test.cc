#include "kernels/cpu/ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kUntouched = 12345;

std::vector<float> Random(size_t count, unsigned seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// The values in `dtype`, as bytes, and what they are in F32 after that.
std::vector<char> Narrowed(Ops& ops, std::vector<float>& values, DType dtype) {
  const int64_t count = static_cast<int64_t>(values.size());
  std::vector<char> bytes(count * SizeOf(dtype));
  EXPECT_TRUE(ops.Convert(values.data(), count, 1, count, dtype, bytes.data(), Stream{}).ok());
  WidenRows(bytes.data(), dtype, count, 1, static_cast<int>(count), 1, values.data(), count);
  return bytes;
}

// max |got - want| <= bound * max |want|.
testing::AssertionResult IsNear(const std::vector<float>& got, const std::vector<double>& want,
                                double bound) {
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

// --- Linear layers

struct LinearCase {
  int64_t tokens, out, in;
  DType dtype = DType::kF32;
  bool bias = false, accumulate = false;
  int64_t x_padding = 0, y_padding = 0;
};

class LinearLayer : public testing::TestWithParam<BF16Weights> {
 protected:
  // Applies a random layer and compares with a product in double.
  void Check(const LinearCase& c) {
    SCOPED_TRACE(testing::Message() << "[" << c.tokens << ", " << c.in << "] by [" << c.out << ", "
                                    << c.in << "] " << Name(c.dtype) << (c.bias ? " bias" : "")
                                    << (c.accumulate ? " accumulate" : ""));
    std::vector<float> weight = Random(c.out * c.in, 1), bias = Random(c.out, 2);
    const std::vector<char> weight_bytes = Narrowed(*ops_, weight, c.dtype);
    const std::vector<char> bias_bytes = Narrowed(*ops_, bias, c.dtype);
    auto linear = ops_->PrepareLinear(weight_bytes.data(), c.bias ? bias_bytes.data() : nullptr,
                                      c.dtype, c.out, c.in);
    ASSERT_TRUE(linear.ok()) << linear.status();
    EXPECT_EQ((*linear)->in_features(), c.in);
    EXPECT_EQ((*linear)->out_features(), c.out);

    const int64_t x_stride = c.in + c.x_padding, y_stride = c.out + c.y_padding;
    std::vector<float> x = Random(c.tokens * x_stride, 3);
    std::vector<float> y(c.tokens * y_stride, kUntouched);
    const std::vector<float> before = Random(c.tokens * c.out, 4);
    if (c.accumulate) {
      for (int64_t t = 0; t < c.tokens; ++t) {
        std::copy_n(&before[t * c.out], c.out, &y[t * y_stride]);
      }
    }
    const absl::Status status = ops_->Apply({.linear = linear->get(),
                                             .x = x.data(),
                                             .x_stride = x_stride,
                                             .y = y.data(),
                                             .y_stride = y_stride,
                                             .tokens = c.tokens,
                                             .accumulate = c.accumulate},
                                            Stream{});
    ASSERT_TRUE(status.ok()) << status;

    const bool native =
        c.dtype == DType::kBF16 && GetParam() == BF16Weights::kBestForCpu && CpuMultipliesBF16();
    if (native) Narrowed(*ops_, x, DType::kBF16);  // what the layer multiplies
    std::vector<float> got;
    std::vector<double> want;
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t o = 0; o < c.out; ++o) {
        double sum = (c.bias ? bias[o] : 0.0) + (c.accumulate ? before[t * c.out + o] : 0.0);
        for (int64_t i = 0; i < c.in; ++i)
          sum += double{x[t * x_stride + i]} * weight[o * c.in + i];
        want.push_back(sum);
        got.push_back(y[t * y_stride + o]);
      }
      for (int64_t o = c.out; o < y_stride; ++o) EXPECT_EQ(y[t * y_stride + o], kUntouched);
    }
    EXPECT_TRUE(IsNear(got, want, 2e-6));
  }

  std::unique_ptr<Ops> ops_ = CreateOps(2, GetParam());
};
INSTANTIATE_TEST_SUITE_P(BF16, LinearLayer,
                         testing::Values(BF16Weights::kBestForCpu, BF16Weights::kWiden),
                         [](const auto& bf16) {
                           return bf16.param == BF16Weights::kWiden ? "Widen" : "BestForCpu";
                         });

TEST_P(LinearLayer, IsTheProductAtAnyNumberOfTokens) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int64_t tokens : {1, 2, 63, 513, 1025}) {  // past the staging of BF16, twice
      Check({.tokens = tokens, .out = 33, .in = 65, .dtype = dtype});
    }
  }
}

TEST_P(LinearLayer, IsTheProductAtAnyWidth) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    Check({.tokens = 5, .out = 1, .in = 1, .dtype = dtype});
    Check({.tokens = 3, .out = 7, .in = 13, .dtype = dtype});
    Check({.tokens = 4, .out = 192, .in = 576, .dtype = dtype});
    Check({.tokens = 4, .out = 576, .in = 1536, .dtype = dtype});
  }
}

TEST_P(LinearLayer, AddsBiasAndAccumulatesIntoStridedRows) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (bool bias : {false, true}) {
      for (bool accumulate : {false, true}) {
        for (int64_t tokens : {9, 600}) {
          Check({.tokens = tokens,
                 .out = 48,
                 .in = 40,
                 .dtype = dtype,
                 .bias = bias,
                 .accumulate = accumulate,
                 .x_padding = 24,
                 .y_padding = 5});
        }
      }
    }
  }
}

TEST_P(LinearLayer, OfNoTokensDoesNothing) { Check({.tokens = 0, .out = 8, .in = 8}); }

TEST_P(LinearLayer, OfNoWidthIsRefused) {
  const float weight = 1;
  EXPECT_FALSE(ops_->PrepareLinear(&weight, nullptr, DType::kF32, 0, 1).ok());
  EXPECT_FALSE(ops_->PrepareLinear(&weight, nullptr, DType::kF32, 1, -1).ok());
  EXPECT_FALSE(ops_->PrepareLinear(&weight, nullptr, DType::kF32, int64_t{1} << 40, 1).ok());
}

TEST_P(LinearLayer, UsesTheWeightsWhereTheyLieWhenItCan) {
  std::vector<float> weight = {1, 2};
  auto linear = *ops_->PrepareLinear(weight.data(), nullptr, DType::kF32, 1, 2);
  weight = {3, 4};
  const float x[] = {1, 1};
  float y = 0;
  ASSERT_TRUE(
      ops_->Apply(
              {.linear = linear.get(), .x = x, .x_stride = 2, .y = &y, .y_stride = 1, .tokens = 1},
              Stream{})
          .ok());
  EXPECT_EQ(y, 7);
}

// --- The vectorised loops, on every instruction set of this machine

class Elementwise : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(0); }

  std::unique_ptr<Ops> ops_ = CreateOps(2);
};

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
INSTANTIATE_TEST_SUITE_P(Every, Elementwise, testing::ValuesIn(Targets()),
                         [](const auto& target) { return hwy::TargetName(target.param); });

TEST_P(Elementwise, RmsNormDividesByTheRootMeanSquare) {
  for (int64_t width : {1, 7, 64, 576, 1001}) {
    const int64_t tokens = 70;
    const std::vector<float> x = Random(tokens * width, 1, 3), weight = Random(width, 2);
    std::vector<float> out(x.size());
    ASSERT_TRUE(
        ops_->RmsNorm(x.data(), weight.data(), 1e-5f, width, tokens, out.data(), Stream{}).ok());
    std::vector<double> want;
    for (int64_t t = 0; t < tokens; ++t) {
      double squares = 0;
      for (int64_t i = 0; i < width; ++i) squares += std::pow(double{x[t * width + i]}, 2);
      const double scale = 1 / std::sqrt(squares / width + double{1e-5f});
      for (int64_t i = 0; i < width; ++i) want.push_back(x[t * width + i] * scale * weight[i]);
    }
    EXPECT_TRUE(IsNear(out, want, 1e-6)) << width;
    std::vector<float> in_place = x;
    ASSERT_TRUE(ops_->RmsNorm(in_place.data(), weight.data(), 1e-5f, width, tokens, in_place.data(),
                              Stream{})
                    .ok());
    EXPECT_EQ(in_place, out) << width;
  }
}

TEST_P(Elementwise, RmsNormOfZerosIsZero) {
  std::vector<float> x(64, 0.0f), weight(64, 1.0f);
  ASSERT_TRUE(ops_->RmsNorm(x.data(), weight.data(), 1e-6f, 64, 1, x.data(), Stream{}).ok());
  EXPECT_EQ(x, std::vector<float>(64, 0.0f));
}

TEST_P(Elementwise, RopeTurnsPairsByPositionTimesFrequency) {
  const std::vector<int32_t> positions = {0, 1, 2, 3, 127, 8191, 131071, 1 << 20, (1 << 24) - 1};
  const int64_t tokens = static_cast<int64_t>(positions.size());
  for (int head_dim : {2, 6, 64, 96, 128, 256}) {
    const int heads = 3, half = head_dim / 2;
    const int64_t stride = heads * head_dim + 5;
    std::vector<float> frequency(half);
    for (int i = 0; i < half; ++i) {
      frequency[i] = 1.0f / std::pow(10000.0f, 2.0f * i / head_dim);
    }
    const std::vector<float> x = Random(tokens * stride, 7);
    std::vector<float> got = x;
    ASSERT_TRUE(ops_->Rope({.x = got.data(),
                            .token_stride = stride,
                            .heads = heads,
                            .head_dim = head_dim,
                            .positions = positions.data(),
                            .inverse_frequency = frequency.data(),
                            .tokens = tokens},
                           Stream{})
                    .ok());
    std::vector<double> want(x.begin(), x.end());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < half; ++i) {
          const double angle = static_cast<float>(positions[t]) * frequency[i];  // rounded to F32
          const int64_t low = t * stride + h * head_dim + i;
          want[low] = x[low] * std::cos(angle) - x[low + half] * std::sin(angle);
          want[low + half] = x[low + half] * std::cos(angle) + x[low] * std::sin(angle);
        }
      }
    }
    EXPECT_TRUE(IsNear(got, want, 2e-7)) << head_dim;
  }
}

TEST_P(Elementwise, RopeOfAnOddOrHugeHeadIsRefused) {
  for (int head_dim : {0, 63, 258}) {
    EXPECT_FALSE(ops_->Rope({.head_dim = head_dim}, Stream{}).ok()) << head_dim;
  }
}

TEST_P(Elementwise, SwiGluIsSiluOfGateTimesUp) {
  std::vector<float> gate = Random(100'003, 1, 5), up = Random(gate.size(), 2);
  const std::vector<float> extremes = {-1e30f, -104, -88, -87, 0, -0.0f, 88, 1e30f};
  std::copy(extremes.begin(), extremes.end(), gate.begin());
  std::fill_n(up.begin(), extremes.size(), 1.0f);
  std::vector<float> out(gate.size());
  ASSERT_TRUE(ops_->SwiGlu(gate.data(), up.data(), gate.size(), out.data(), Stream{}).ok());
  for (size_t i = 0; i < gate.size(); ++i) {
    const double want = gate[i] / (1 + std::exp(-double{gate[i]})) * up[i];
    ASSERT_NEAR(out[i], want, 5e-7 * std::abs(want) + 1e-7 * (gate[i] < -80))
        << i << ": " << gate[i];
  }
  ASSERT_TRUE(ops_->SwiGlu(gate.data(), up.data(), gate.size(), gate.data(), Stream{}).ok());
  EXPECT_EQ(gate, out);
  const float nan = NAN, one = 1;
  float result = 0;
  ASSERT_TRUE(ops_->SwiGlu(&nan, &one, 1, &result, Stream{}).ok());
  EXPECT_TRUE(std::isnan(result));
}

TEST_P(Elementwise, EmbedWidensTheRowsOfTheTable) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int64_t width : {3, 64, 577}) {
      std::vector<float> table = Random(50 * width, 3);
      const std::vector<char> bytes = Narrowed(*ops_, table, dtype);
      const std::vector<uint32_t> ids = {49, 0, 7, 7, 48};
      std::vector<float> out(ids.size() * width);
      ASSERT_TRUE(
          ops_->Embed(bytes.data(), dtype, width, ids.data(), 5, out.data(), Stream{}).ok());
      for (size_t t = 0; t < ids.size(); ++t) {
        for (int64_t i = 0; i < width; ++i) {
          ASSERT_EQ(out[t * width + i], table[ids[t] * width + i]) << Name(dtype) << " " << t;
        }
      }
    }
  }
}

// Every value of a half type with its neighbours in F32, and the ties between it and the next.
TEST_P(Elementwise, ConvertRoundsToNearestEven) {
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
    ASSERT_TRUE(
        ops_->Convert(values.data(), values.size(), 1, values.size(), dtype, got.data(), Stream{})
            .ok());
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i], want[i]) << Name(dtype) << " of " << std::hexfloat << values[i];
    }
  }
}

TEST_P(Elementwise, ConvertKeepsNanNan) {
  for (uint32_t bits : {0x7F800001u, 0x7FC00000u, 0xFFFFFFFFu}) {
    const float nan = std::bit_cast<float>(bits);
    uint16_t bf16 = 0, f16 = 0;
    ASSERT_TRUE(ops_->Convert(&nan, 1, 1, 1, DType::kBF16, &bf16, Stream{}).ok());
    ASSERT_TRUE(ops_->Convert(&nan, 1, 1, 1, DType::kF16, &f16, Stream{}).ok());
    EXPECT_GT(bf16 & 0x7FFF, 0x7F80) << bits;
    EXPECT_GT(f16 & 0x7FFF, 0x7C00) << bits;
  }
}

TEST_P(Elementwise, ConvertTakesStridedRows) {
  const std::vector<float> src = {1, 2, 3, 99, 4, 5, 6, 99, 7, 8, 9};
  std::vector<float> f32(9);
  std::vector<uint16_t> bf16(10, 0xABCD);
  ASSERT_TRUE(ops_->Convert(src.data(), 4, 3, 3, DType::kF32, f32.data(), Stream{}).ok());
  ASSERT_TRUE(ops_->Convert(src.data(), 4, 3, 3, DType::kBF16, bf16.data(), Stream{}).ok());
  EXPECT_THAT(f32, testing::ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9));
  EXPECT_EQ(bf16[0], 0x3F80);
  EXPECT_EQ(bf16[8], 0x4110);
  EXPECT_EQ(bf16[9], 0xABCD);
}

}  // namespace
}  // namespace prefilld::cpu
