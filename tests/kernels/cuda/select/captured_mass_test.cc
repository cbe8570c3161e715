// The measurement between stages 2 and 3 on the GPU, against the oracle over the same index.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/select/selection.h"
#include "tests/kernels/cuda/cuda_case.h"

namespace prefilld::cuda {
namespace {

class CapturedMassOnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasDevice()) GTEST_SKIP() << "no GPU";
  }

  static void ExpectSame(const CaseOptions& options, int keep_percent = 40, double least = 0) {
    SCOPED_TRACE(Describe(options));
    const SparsityPolicy policy{.min_captured_mass = least};
    CudaCase input(options);
    const CudaCase::Rows rows = input.RandomRows(keep_percent);
    input.SetIndex(rows);
    const Selected got = input.MeasureCapturedMass(policy);
    const Selected want = input.ReferenceMeasure(policy, rows);
    EXPECT_EQ(got.rows, want.rows);
    for (size_t x = 0; x < want.report.size(); ++x) {
      const HeadReport &a = got.report[x], &b = want.report[x];
      EXPECT_NEAR(a.captured_mass, b.captured_mass, 1e-4) << "head " << x;
      EXPECT_NEAR(a.captured_mass_min, b.captured_mass_min, 1e-4) << "head " << x;
      EXPECT_EQ(a.pattern, b.pattern) << "head " << x;
      EXPECT_EQ(a.dense_reason, b.dense_reason) << "head " << x;
      EXPECT_EQ(a.density, b.density) << "head " << x;
    }
  }
};

// In every row of dtypes.
class CapturedMassInEveryDType : public CapturedMassOnGpu,
                                 public testing::WithParamInterface<DTypeRow> {
 protected:
  void ExpectSameIn(DType dtype, CaseOptions options, int keep_percent = 40, double least = 0) {
    options.dtype = dtype;
    ExpectSame(options, keep_percent, least);
  }
};

INSTANTIATE_TEST_SUITE_P(Every, CapturedMassInEveryDType, testing::ValuesIn(kDTypeRows),
                         [](const auto& row) { return std::string(row.param.name); });

// Small enough for compute-sanitizer: every path once.
TEST_P(CapturedMassInEveryDType, Smoke) {
  const DType dtype = GetParam().dtypes[0];
  ExpectSameIn(dtype, {.q_heads = 2, .kv_heads = 1, .head_dim = 64, .sq = {700}}, 30, 0.5);
  ExpectSameIn(dtype, {.q_heads = 2,
                       .kv_heads = 1,
                       .sq = {100, 1, 130},
                       .sk = {490, 1, 130},
                       .layout = Layout::kPaged});
}

TEST_P(CapturedMassInEveryDType, MatchesTheOracle) {
  for (Family family : cpu::kFamilies) {
    for (int64_t length : cpu::kLengths) {
      ExpectSameIn(GetParam().dtypes[0], {.head_dim = 64, .sq = {length}, .family = family});
    }
  }
  for (DType dtype : GetParam().dtypes) {
    for (int d : GetParam().head_dims) {
      for (int block_size : {64, 128}) {
        for (Layout layout : {Layout::kTokens, Layout::kHeads, Layout::kPaged}) {
          ExpectSameIn(dtype, {.head_dim = d,
                               .block_size = block_size,
                               .sq = {65, 1200, 1},
                               .sk = {65, 1500, 300},
                               .layout = layout});
        }
      }
    }
  }
}

TEST_F(CapturedMassOnGpu, MatchesTheOracleInALongSequenceAndInGroupsOfHeads) {
  ExpectSame({.sq = {20000}, .family = Family::kBand}, 5);
  for (const auto& [q_heads, kv_heads] : {std::pair{8, 8}, {7, 1}, {12, 4}, {16, 1}}) {
    ExpectSame({.q_heads = q_heads, .kv_heads = kv_heads, .sq = {600}});
  }
}

TEST_F(CapturedMassOnGpu, GivesHeadsBelowTheMinimumEveryBlock) {
  for (double least : {0.3, 0.5, 0.9, 0.9999}) {
    ExpectSame({.sq = {2000, 700}, .sk = {2000, 1100}, .family = Family::kBand}, 50, least);
    ExpectSame({.block_size = 64, .sq = {2000}}, 50, least);
  }
}

TEST_F(CapturedMassOnGpu, EveryBlockCapturesAll) {
  CudaCase input({.sq = {1500}});
  input.SetIndex(input.RandomRows(100));
  for (const HeadReport& report : input.MeasureCapturedMass({.min_captured_mass = 0.5}).report) {
    EXPECT_NEAR(report.captured_mass, 1, 1e-5);
    EXPECT_NEAR(report.captured_mass_min, 1, 1e-5);
    EXPECT_EQ(report.dense_reason, DenseReason::kNone);
  }
}

TEST_F(CapturedMassOnGpu, GivesTheSameBitsEveryTime) {
  CudaCase input({.sq = {3000, 700}, .sk = {3000, 1000}});
  input.SetIndex(input.RandomRows(30));
  const Selected first = input.MeasureCapturedMass({});
  for (int poison : {0x00, 0x5A}) {
    const Selected again = input.MeasureCapturedMass({}, poison);
    for (size_t x = 0; x < first.report.size(); ++x) {
      EXPECT_EQ(first.report[x].captured_mass, again.report[x].captured_mass);
      EXPECT_EQ(first.report[x].captured_mass_min, again.report[x].captured_mass_min);
    }
  }
}

TEST_F(CapturedMassOnGpu, SurvivesAnyInput) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float poison : {std::numeric_limits<float>::quiet_NaN(), inf, -inf}) {
    for (size_t step : {1u, 1001u}) {
      CudaCase input({.sq = {1000}}, [&](cpu::Case* wide) {
        for (size_t i = 0; i < wide->k().size(); i += step) wide->k()[i] = poison;
      });
      input.SetIndex(input.RandomRows(30));
      const Selected selected = input.MeasureCapturedMass({.min_captured_mass = 0.5});
      ExpectWellFormed(input, selected);
      for (const HeadReport& report : selected.report) {
        EXPECT_GE(report.captured_mass, 0);  // NaN is not
        EXPECT_LE(report.captured_mass, 1);
        EXPECT_GE(report.captured_mass_min, 0);
      }
    }
  }
}

}  // namespace
}  // namespace prefilld::cuda
