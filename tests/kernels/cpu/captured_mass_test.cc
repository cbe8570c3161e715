#include "kernels/cpu/captured_mass.h"

#include "tests/kernels/cpu/selection_case.h"

namespace prefilld::cpu {
namespace {

TEST(CapturedMass, EqualsTheReferenceForEveryMethod) {
  for (Family family : kFamilies) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      for (const auto& [sq, sk] : {std::pair<int64_t, int64_t>{1, 1}, {60, 500}, {1300, 1300}}) {
        Case input({.family = family, .dtype = dtype, .sq = {sq}, .sk = {sk}});
        for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
          if (method == Method::kFlexPrefill && sq != sk) continue;
          const SparsityPolicy policy = {.method = method, .gamma = .5};
          SCOPED_TRACE(Describe(family, sk, dtype, .5) + " " + Name(method));
          ExpectSame(Select(&input, policy), ReferenceSelect(&input, policy));
        }
      }
    }
  }
}

TEST(CapturedMass, CountsKeysOfSelectedBlocksOnly) {
  // Zero inputs: every visible key has the same mass. The one row of blocks reads block 0 alone.
  Case input({.family = Family::kZero, .q_heads = 1, .kv_heads = 1, .sq = {128}, .sk = {256}});
  const AttentionArgs args = input.Args({.method = Method::kJoint});
  args.index.count_at(0, 0) = 1;
  args.index.row_at(0, 0)[0] = 0;
  args.report[0].pattern = Pattern::kJoint;
  BlockMass probe;
  MeasureCapturedMass(args, std::vector<int>{0}, 1, &probe);
  double sum = 0, least = 1;
  for (int64_t t : MeasuredRows(128)) {
    sum += 128.0 / static_cast<double>(129 + t);
    least = std::min(least, 128.0 / static_cast<double>(129 + t));
  }
  EXPECT_FLOAT_EQ(args.report[0].captured_mass, static_cast<float>(sum / 64));
  EXPECT_FLOAT_EQ(args.report[0].captured_mass_min, static_cast<float>(least));
}

TEST(CapturedMass, AHeadBelowTheMinimumRunsDense) {
  Case input({.family = Family::kNeedle, .sq = {2000}, .sk = {2000}});
  SparsityPolicy policy = {.method = Method::kFlexPrefill, .gamma = .5};
  const Selected free = Select(&input, policy);
  // A minimum between the worst and the best head splits them.
  float low = 1, high = 0;
  for (const HeadReport& head : free.report) {
    low = std::min(low, head.captured_mass);
    high = std::max(high, head.captured_mass);
  }
  ASSERT_LT(low, high);
  policy.min_captured_mass = (low + high) / 2;
  const Selected bounded = Select(&input, policy);
  for (int h = 0; h < 4; ++h) {
    const HeadReport& head = bounded.report[h];
    if (free.report[h].captured_mass >= policy.min_captured_mass) {
      EXPECT_EQ(head.captured_mass, free.report[h].captured_mass);
      EXPECT_EQ(head.dense_reason, DenseReason::kNone);
      continue;
    }
    EXPECT_EQ(head.pattern, Pattern::kDense);
    EXPECT_EQ(head.dense_reason, DenseReason::kMinCapturedMass);
    EXPECT_EQ(head.density, 1);
    EXPECT_EQ(head.captured_mass, 1);
    EXPECT_EQ(head.captured_mass_min, 1);
    for (int row = 0; row < 16; ++row) EXPECT_EQ(bounded.rows[h * 16 + row].size(), row + 1u);
  }
  ExpectSame(bounded, ReferenceSelect(&input, policy));
}

TEST(CapturedMass, OfDenseAttentionIsOne) {
  Case input({.sq = {400}, .sk = {400}});
  SparsityPolicy policy = {.method = Method::kDense, .min_captured_mass = 1};
  for (const HeadReport& head : Select(&input, policy).report) {
    EXPECT_EQ(head.captured_mass, 1);
    EXPECT_EQ(head.captured_mass_min, 1);
    EXPECT_EQ(head.density, 1);
    EXPECT_EQ(head.dense_reason, DenseReason::kNone);
  }
}

}  // namespace
}  // namespace prefilld::cpu
