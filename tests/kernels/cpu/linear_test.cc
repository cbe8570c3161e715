#include "kernels/cpu/linear.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/cpu/numbers.h"

namespace prefilld::cpu {
namespace {

constexpr float kUntouched = 12345;

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
    const std::vector<char> weight_bytes = Narrowed(weight, c.dtype);
    const std::vector<char> bias_bytes = Narrowed(bias, c.dtype);
    const LinearPart part = {weight_bytes.data(), c.bias ? bias_bytes.data() : nullptr, c.out};
    auto linear = multiplier_.Prepare({.parts = {part}, .dtype = c.dtype, .in_features = c.in});
    ASSERT_TRUE(linear.ok()) << linear.status();
    EXPECT_EQ((*linear)->in_features(), c.in);
    EXPECT_EQ((*linear)->parts()[0].out_features, c.out);

    const int64_t x_stride = c.in + c.x_padding, y_stride = c.out + c.y_padding;
    std::vector<float> x = Random(c.tokens * x_stride, 3);
    std::vector<float> y(c.tokens * y_stride, kUntouched);
    const std::vector<float> before = Random(c.tokens * c.out, 4);
    if (c.accumulate) {
      for (int64_t t = 0; t < c.tokens; ++t) {
        std::copy_n(&before[t * c.out], c.out, &y[t * y_stride]);
      }
    }
    const absl::Status status = multiplier_.Run({.linear = linear->get(),
                                                 .x = F32Rows(x, x_stride),
                                                 .y = F32Rows(y, y_stride),
                                                 .tokens = c.tokens,
                                                 .accumulate = c.accumulate});
    ASSERT_TRUE(status.ok()) << status;

    const bool native =
        c.dtype == DType::kBF16 && GetParam() == BF16Weights::kBestForCpu && CpuMultipliesBF16();
    if (native) Narrowed(x, DType::kBF16);  // what the layer multiplies
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

  Multiplier multiplier_{2, GetParam()};
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
  const auto prepare = [&](int64_t out, int64_t in) {
    return multiplier_.Prepare({.parts = {{&weight, nullptr, out}}, .in_features = in}).ok();
  };
  EXPECT_TRUE(prepare(1, 1));
  EXPECT_FALSE(prepare(0, 1));
  EXPECT_FALSE(prepare(1, -1));
  EXPECT_FALSE(prepare(int64_t{1} << 40, 1));
}

TEST_P(LinearLayer, UsesTheWeightsWhereTheyLieWhenItCan) {
  std::vector<float> weight = {1, 2}, x = {1, 1}, y = {0};
  const auto linear =
      *multiplier_.Prepare({.parts = {{weight.data(), nullptr, 1}}, .in_features = 2});
  weight = {3, 4};
  ASSERT_TRUE(
      multiplier_.Run({.linear = linear.get(), .x = F32Rows(x, 2), .y = F32Rows(y, 1), .tokens = 1})
          .ok());
  EXPECT_EQ(y[0], 7);
}

TEST_P(LinearLayer, KeepsItsPartsApart) {
  std::vector<float> first = {1, 2, 3, 4}, second = {5, 6}, bias = {100}, x = {1, 10};
  const auto linear = *multiplier_.Prepare(
      {.parts = {{first.data(), nullptr, 2}, {second.data(), bias.data(), 1}}, .in_features = 2});
  EXPECT_EQ(linear->WorkspaceBytes(7), 7 * sizeof(float));
  std::vector<float> y(2), z(1);
  const Rows from = F32Rows(x, 2);
  ASSERT_TRUE(
      multiplier_.Run({.linear = linear.get(), .x = from, .y = F32Rows(y, 2), .tokens = 1}).ok());
  ASSERT_TRUE(
      multiplier_
          .Run({.linear = linear.get(), .part = 1, .x = from, .y = F32Rows(z, 1), .tokens = 1})
          .ok());
  EXPECT_EQ(y, (std::vector<float>{21, 43}));
  EXPECT_EQ(z, (std::vector<float>{165}));
}

}  // namespace
}  // namespace prefilld::cpu
