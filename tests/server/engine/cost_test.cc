#include "server/engine/cost.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

TEST(CostModel, AttentionGrowsWithTheSquareAndDensity) {
  CostModel cost;
  const double one = cost.AttentionSeconds(8, 64, 4096, 4096, 1);
  EXPECT_NEAR(cost.AttentionSeconds(8, 64, 8192, 8192, 1) / one, 4, 0.01);
  EXPECT_NEAR(cost.AttentionSeconds(8, 64, 4096, 4096, 0.25) / one, 0.25, 1e-9);
}

TEST(CostModel, APrefixCostsOnlyItsKeys) {
  CostModel cost;
  const double whole = cost.AttentionSeconds(1, 64, 4096, 4096, 1);
  const double half = cost.AttentionSeconds(1, 64, 2048, 4096, 1);
  EXPECT_NEAR(half / whole, 0.75, 0.001);
}

TEST(CostModel, FollowsWhatIsObserved) {
  CostModel cost;
  for (int i = 0; i < 100; ++i) cost.ObserveAttention(8, 64, 4096, 4096, 0.5, 2.0);
  EXPECT_NEAR(cost.AttentionSeconds(8, 64, 4096, 4096, 0.5), 2.0, 0.01);
  for (int i = 0; i < 100; ++i) cost.ObserveLinear(1000, 1 << 20, 3.0);
  EXPECT_NEAR(cost.LinearSeconds(1000, 1 << 20), 3.0, 0.01);
}

TEST(CostModel, NonsenseIsNotLearned) {
  CostModel cost;
  const double before = cost.LinearSeconds(1000, 1 << 20);
  cost.ObserveLinear(1000, 1 << 20, 0);
  cost.ObserveLinear(0, 1 << 20, 0);
  EXPECT_EQ(cost.LinearSeconds(1000, 1 << 20), before);
}

TEST(CostModel, ShortPromptsAreDenseAndLongOnesSparse) {
  CostModel cost;
  EXPECT_FALSE(cost.SparseIsFaster(9, 64, 128, 128));
  EXPECT_TRUE(cost.SparseIsFaster(9, 64, 65536, 65536));
}

TEST(CostModel, PredictedDensityFallsWithLengthAndFollowsObservations) {
  CostModel cost;
  EXPECT_EQ(cost.PredictedDensity(1), 1);
  EXPECT_GT(cost.PredictedDensity(60), cost.PredictedDensity(1024));
  for (int i = 0; i < 100; ++i) cost.ObserveDensity(60, 0.6);
  EXPECT_NEAR(cost.PredictedDensity(60), 0.6, 0.01);
}

}  // namespace
}  // namespace prefilld
