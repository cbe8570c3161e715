#include "server/engine/cost.h"

#include <gtest/gtest.h>

#include <limits>

namespace prefilld {
namespace {

CostModel::Work Prompt(int64_t tokens, int heads = 8) {
  return CostModel::WorkOf(heads, 64, tokens, tokens);
}

TEST(CostCurve, IsAPowerLawBetweenPointsAndARateBeyondThem) {
  CostCurve curve(1);
  curve.Set({{1000, 10}, {100, 1}, {10'000, 1000}});
  EXPECT_DOUBLE_EQ(curve.Seconds(50), 0.5);
  EXPECT_DOUBLE_EQ(curve.Seconds(100), 1);
  EXPECT_NEAR(curve.Seconds(500), 5, 1e-9);
  EXPECT_NEAR(curve.Seconds(2000), 40, 1e-9);
  EXPECT_DOUBLE_EQ(curve.Seconds(20'000), 2000);
}

TEST(CostCurve, FollowsWhatIsObservedAsAWhole) {
  CostCurve curve(1);
  curve.Set({{100, 1}, {1000, 10}});
  for (int i = 0; i < 100; ++i) curve.Observe(1000, 20);
  EXPECT_NEAR(curve.Seconds(100), 2, 0.01);
}

// Three tokens take as long as thirty: no reason to expect the same of thirty thousand.
TEST(CostCurve, OverheadsOfTinyCallsAreNotItsRate) {
  CostCurve curve(1);
  curve.Set({{1000, 10}});
  for (int i = 0; i < 100; ++i) curve.Observe(1, 5);
  EXPECT_DOUBLE_EQ(curve.Seconds(1000), 10);
}

TEST(CostCurve, OneSlowCallDoesNotSpoilIt) {
  CostCurve curve(1);
  curve.Set({{1000, 10}});
  curve.Observe(1000, 10'000);
  EXPECT_LT(curve.Seconds(1000), 12);
}

TEST(CostCurve, NonsenseIsNotLearned) {
  CostCurve curve(10);
  curve.Set({{0, 1}, {1, 0}});
  EXPECT_EQ(curve.Seconds(20), 2);
  curve.Observe(20, 0);
  curve.Observe(0, 0);
  curve.Observe(20, std::numeric_limits<double>::infinity());
  EXPECT_EQ(curve.Seconds(20), 2);
}

TEST(CostModel, AttentionGrowsWithTheSquareAndDensity) {
  CostModel cost;
  EXPECT_NEAR(cost.DenseSeconds(Prompt(8192)) / cost.DenseSeconds(Prompt(4096)), 4, 0.01);
  EXPECT_NEAR(cost.SparseSeconds(Prompt(4096), 0.25) / cost.SparseSeconds(Prompt(4096), 1), 0.25,
              1e-9);
}

TEST(CostModel, APrefixCostsOnlyItsKeys) {
  CostModel cost;
  const double whole = cost.DenseSeconds(CostModel::WorkOf(1, 64, 4096, 4096));
  const double half = cost.DenseSeconds(CostModel::WorkOf(1, 64, 2048, 4096));
  EXPECT_NEAR(half / whole, 0.75, 0.001);
}

TEST(CostModel, ABatchIsTheSumOfItsSequences) {
  const CostModel::Work one = Prompt(1000), other = Prompt(3000);
  const CostModel::Work both =
      CostModel::WorkOf({DType::kF32, 8, 8, 64, {0, 1000, 4000}, {0, 1000, 4000}});
  EXPECT_DOUBLE_EQ(both.dense, one.dense + other.dense);
  EXPECT_DOUBLE_EQ(both.select, one.select + other.select);
  EXPECT_EQ(both.k_blocks, other.k_blocks);
}

TEST(CostModel, FollowsWhatIsObserved) {
  CostModel cost;
  for (int i = 0; i < 100; ++i) {
    cost.ObserveDense(Prompt(4096), 4.0);
    cost.ObserveSparse(Prompt(4096), 0.5, 2.5);
    cost.ObserveSelect(Prompt(4096), 0.1);
    cost.ObserveLinear(1000, 1 << 20, 3.0);
  }
  EXPECT_NEAR(cost.DenseSeconds(Prompt(4096)), 4.0, 0.01);
  EXPECT_NEAR(cost.SparseSeconds(Prompt(4096), 0.5), 2.5, 0.01);
  EXPECT_NEAR(cost.SelectSeconds(Prompt(4096)), 0.1, 0.001);
  EXPECT_NEAR(cost.LinearSeconds(1000, 1 << 20), 3.0, 0.01);
}

TEST(CostModel, ShortPromptsAreDenseAndLongOnesSparse) {
  CostModel cost;
  EXPECT_FALSE(cost.SparseIsFaster(Prompt(128, 9)));
  EXPECT_TRUE(cost.SparseIsFaster(Prompt(65536, 9)));
}

TEST(CostModel, AfterSelectingOnlyTheAttentionCounts) {
  CostModel cost;
  cost.SetCurves({{1e9, 1}}, {{1e9, 1.25}}, {{1e9, 1}});
  EXPECT_TRUE(cost.SparseIsFaster(Prompt(4096), 0.77));
  EXPECT_FALSE(cost.SparseIsFaster(Prompt(4096), 0.79));
}

TEST(CostModel, WhereEveryBlockIsKeptNothingIsSaved) {
  CostModel cost;
  cost.SetCurves({{1e6, 10}}, {{1e6, 0.1}}, {{1e6, 0.1}});  // dense was disturbed
  EXPECT_FALSE(cost.SparseIsFaster(Prompt(1024)));
  EXPECT_FALSE(cost.SparseIsFaster(Prompt(1024), 1.0));
  EXPECT_FALSE(cost.SelectingIsFaster(Prompt(1024), 1.0));
  EXPECT_TRUE(cost.SelectingIsFaster(Prompt(1024), 0.9));
}

// Measured on one H200, 32/8/128: selecting costs tens of microseconds whatever the length.
TEST(CostModel, AFixedCostOfSelectionKeepsShortPromptsDense) {
  CostModel cost;
  const auto at = [](int64_t tokens) { return CostModel::WorkOf(32, 128, tokens, tokens); };
  cost.SetCurves({{at(256).dense, 10e-6},
                  {at(1024).dense, 35e-6},
                  {at(4096).dense, 290e-6},
                  {at(16384).dense, 3.6e-3}},
                 {{at(256).dense, 15e-6},
                  {at(1024).dense, 40e-6},
                  {at(4096).dense, 320e-6},
                  {at(16384).dense, 3.9e-3}},
                 {{at(256).select, 50e-6},
                  {at(1024).select, 55e-6},
                  {at(4096).select, 80e-6},
                  {at(16384).select, 200e-6}});
  EXPECT_FALSE(cost.SparseIsFaster(at(256)));
  EXPECT_FALSE(cost.SparseIsFaster(at(1024)));
  EXPECT_TRUE(cost.SparseIsFaster(at(16384)));
}

TEST(CostModel, PredictedDensityFallsWithLengthAndFollowsObservations) {
  CostModel cost;
  EXPECT_EQ(cost.PredictedDensity(1), 1);
  EXPECT_GT(cost.PredictedDensity(60), cost.PredictedDensity(1024));
  for (int i = 0; i < 10; ++i) cost.ObserveDensity(60, 0.6);
  EXPECT_NEAR(cost.PredictedDensity(60), 0.6, 0.01);
}

// Prompts that keep nearly everything: one selection in vain, then seldom, so that all of them
// together cost at most a percent more than dense; and what keeps little is found out soon after.
TEST(CostModel, AWrongGuessIsNotMadeAgainAtOnce) {
  CostModel cost;
  const auto at = [](int64_t tokens) { return CostModel::WorkOf(32, 128, tokens, tokens); };
  cost.SetCurves({{at(4096).dense, 253e-6}, {at(16384).dense, 3.3e-3}},
                 {{at(4096).dense, 253e-6}, {at(16384).dense, 3.3e-3}},
                 {{at(4096).select, 80e-6}, {at(16384).select, 160e-6}});
  for (int64_t tokens : {4096, 16384}) {
    double lost = 0;
    const auto runs_sparse = [&](double density) {
      if (!cost.SparseIsFaster(at(tokens)) && !cost.WorthATry(at(tokens))) return false;
      cost.ObserveDensity(at(tokens).k_blocks, density);
      if (cost.SparseIsFaster(at(tokens), density)) return true;
      lost += cost.SelectSeconds(at(tokens));
      return false;
    };
    for (int i = 0; i < 1000; ++i) EXPECT_FALSE(runs_sparse(0.98));
    EXPECT_LT(lost, 0.01 * 1000 * cost.DenseSeconds(at(tokens))) << tokens;
    int calls = 0;
    while (!runs_sparse(0.2)) ASSERT_LT(++calls, 100);
    EXPECT_TRUE(runs_sparse(0.2)) << tokens;
  }
}

}  // namespace
}  // namespace prefilld
