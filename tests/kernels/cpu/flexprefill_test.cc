#include "kernels/cpu/flexprefill.h"

#include <cmath>

#include "tests/kernels/cpu/selection_case.h"

namespace prefilld::cpu {
namespace {

SparsityPolicy Policy(double gamma, int64_t min_budget_tokens = 0, int block_size = 128) {
  return {.method = Method::kFlexPrefill,
          .gamma = gamma,
          .min_budget_tokens = min_budget_tokens,
          .block_size = block_size,
          .measure_captured_mass = false};
}

TEST(FlexPrefill, TheScoreThatCrossesGammaCountsForLinesAndNotForSingleBlocks) {
  const std::vector<double> p = {.1, .5, .1, .3};
  EXPECT_EQ(CountWithin(p, .85), 2);      // single blocks: .5 and .3
  EXPECT_EQ(CountWithin(p, .85) + 1, 3);  // lines: k
  EXPECT_EQ(CountWithin(p, .4), 0);
  EXPECT_EQ(CountWithin(p, 2), 4);
}

// A caller may change K between the two times it is read.
TEST(FlexPrefill, NaNAmongManyScoresIsNone) {
  std::vector<double> p(1000, std::nan(""));
  for (size_t x = 0; x < p.size(); x += 7) p[x] = static_cast<double>(x % 5);
  EXPECT_LE(CountWithin(p, 10), 1000);
  EXPECT_EQ(CountWithin(std::vector<double>(1000, std::nan("")), 1), 1000) << "as zeros";
}

TEST(FlexPrefill, A128thLineMakesASecondBlock) {
  EXPECT_EQ(LineBudget(126), 1);  // k = 127
  EXPECT_EQ(LineBudget(127), 2);
  EXPECT_EQ(LineBudget(128), 2);
}

TEST(FlexPrefill, BinsOfDiagonalsEndAtTheMainDiagonal) {
  const int64_t S = 300, n = 3;
  const std::pair<int64_t, int64_t> ranges[] = {{0, 43}, {44, 171}, {172, 299}};  // of each offset
  for (int64_t offset = 0; offset < n; ++offset) {
    for (int64_t delta : {ranges[offset].first, ranges[offset].second}) {
      std::vector<double> scores(S);
      scores[S - 1 - delta] = 1;
      EXPECT_EQ(SumBlocks(scores, 128)[n - 1 - offset], 1) << "delta " << delta;
    }
  }
}

TEST(FlexPrefill, AnExactZeroMakesTheDistanceNaN) {
  EXPECT_TRUE(std::isnan(JensenShannonDistance({1, 0}, {.5, .5})));
  EXPECT_TRUE(std::isnan(JensenShannonDistance({.5, .5}, {1, 0})));
  EXPECT_EQ(JensenShannonDistance({.3, .7}, {.3, .7}), 0);
  EXPECT_NEAR(JensenShannonDistance({.9, .1}, {.1, .9}), .606683, 1e-6);
}

TEST(FlexPrefill, DistancesOfZeroInputsAreThoseOfTheSpecification) {
  const std::pair<int64_t, double> golden[] = {
      {3, .1155}, {4, .1008}, {8, .0718}, {16, .0509}, {32, .0361}};
  for (const auto& [n, distance] : golden) {
    Case input(
        {.family = Family::kZero, .q_heads = 1, .kv_heads = 1, .sq = {n * 128}, .sk = {n * 128}});
    const AttentionArgs args = input.Args(Policy(.95));
    const Head head(args, SplitIntoBlocks(args.shape, 128)[0], 0);
    const FlexPrefillMap map = EstimateFlexPrefill(head, args.policy);
    const std::vector<double> uniform(n, 1.0 / static_cast<double>(n));
    EXPECT_NEAR(JensenShannonDistance(uniform, map.vertical), distance, 5e-5) << "n " << n;
    EXPECT_EQ(map.query_aware, n >= 8) << "n " << n;
  }
}

TEST(FlexPrefill, LineScoresAreDistributions) {
  Case input({.sq = {700}, .sk = {700}});
  const AttentionArgs args = input.Args(Policy(.95));
  for (int h = 0; h < 4; ++h) {
    const Head head(args, SplitIntoBlocks(args.shape, 128)[0], h);
    const FlexPrefillMap map = EstimateFlexPrefill(head, args.policy);
    double vertical = 0, diagonal = 0;
    for (double x : map.vertical) vertical += x;
    for (double x : map.diagonal) diagonal += x;
    EXPECT_NEAR(vertical, 1, 1e-6);
    EXPECT_NEAR(diagonal, 1, 1e-6);
  }
}

// Every block of both must agree: ties fall the same way and near ties do not occur.
TEST(FlexPrefill, ChoosesExactlyTheBlocksOfTheReference) {
  for (Family family : kFamilies) {
    for (int64_t length : kLengths) {
      for (DType dtype : {DType::kF32, DType::kBF16}) {
        const int d = length % 2 ? 64 : 128;
        Case input({.family = family,
                    .dtype = dtype,
                    .q_heads = length > 1000 ? 1 : 2,
                    .kv_heads = 1,
                    .head_dim = d,
                    .sq = {length},
                    .sk = {length}});
        for (double gamma : {.5, .95}) {
          SCOPED_TRACE(Describe(family, length, dtype, gamma));
          const SparsityPolicy policy = Policy(gamma, gamma == .95 ? kFlexPrefillMinBudget : 0);
          const Selected actual = Select(&input, policy);
          ExpectWellFormed(input, policy, actual);
          ExpectSame(actual, ReferenceSelect(&input, policy));
        }
      }
    }
  }
}

TEST(FlexPrefill, QueryAwareHeadsMatchTheReferenceAtWholeBlocks) {
  for (Family family : {Family::kZero, Family::kFaint}) {
    for (int64_t length : {1024, 2048, 4096}) {
      Case input({.family = family, .q_heads = 1, .kv_heads = 1, .sq = {length}, .sk = {length}});
      for (double gamma : {.5, .9}) {
        SCOPED_TRACE(Describe(family, length, DType::kF32, gamma));
        const Selected actual = Select(&input, Policy(gamma));
        EXPECT_EQ(actual.report[0].pattern, Pattern::kQueryAware);
        ExpectSame(actual, ReferenceSelect(&input, Policy(gamma)));
      }
    }
  }
}

TEST(FlexPrefill, BudgetsAndSmallBlocksMatchTheReference) {
  for (Family family : {Family::kFaint, Family::kNeedle, Family::kZero}) {
    Case input({.family = family, .q_heads = 2, .kv_heads = 2, .sq = {1500}, .sk = {1500}});
    for (int block_size : {64, 128}) {
      for (int64_t most : {1, 129, 640}) {
        for (int64_t least : {0, 200, 513}) {
          SparsityPolicy policy = Policy(.8, least, block_size);
          policy.max_budget_tokens = most;
          SCOPED_TRACE(Describe(family, 1500, DType::kF32, .8) + " budgets " +
                       std::to_string(least) + " " + std::to_string(most));
          ExpectSame(Select(&input, policy), ReferenceSelect(&input, policy));
        }
      }
    }
  }
}

TEST(FlexPrefill, ShortPromptsRunDenseAndSayWhy) {
  for (const auto& [length, dense] :
       {std::pair<int64_t, bool>{256, true}, {257, false}, {1024, true}, {1025, false}}) {
    Case input({.sq = {length}, .sk = {length}});
    const Selected selected = Select(&input, Policy(.5, length <= 257 ? 0 : 1024));
    for (const HeadReport& head : selected.report) {
      EXPECT_EQ(head.pattern == Pattern::kDense, dense) << length;
      if (dense) {
        EXPECT_EQ(head.density, 1);
      }
      EXPECT_EQ(head.dense_reason, dense ? DenseReason::kShortPrompt : DenseReason::kNone);
    }
  }
}

TEST(FlexPrefill, RefusesPrefixesByName) {
  Case input({.sq = {100, 300}, .sk = {100, 400}});
  const AttentionArgs args = input.Args(Policy(.9));
  const absl::Status status = Selection(1).Estimate(args);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(std::string(status.message()).find("300 queries and 400 keys"), std::string::npos);
}

TEST(FlexPrefill, LogitsTooLargeForF32DoNotLeaveTheBounds) {
  for (float bad : {NAN, INFINITY, -INFINITY, 3e38f}) {
    Case input({.q_heads = 2, .kv_heads = 1, .sq = {700}, .sk = {700}});
    for (size_t x = 0; x < input.k().size(); x += 977) input.k()[x] = bad;
    const Selected one = Select(&input, Policy(.9));
    ExpectWellFormed(input, Policy(.9), one);
    input.q()[input.q().size() - 5] = bad;
    ExpectWellFormed(input, Policy(.9), Select(&input, Policy(.9)));
    ExpectWellFormed(input, Policy(.9), ReferenceSelect(&input, Policy(.9)));
  }
}

}  // namespace
}  // namespace prefilld::cpu
