#include "server/scheduler/step_watch.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

constexpr absl::Duration kPeriod = absl::Seconds(1);

SteadyTime At(double seconds) { return SteadyTime() + absl::Seconds(seconds); }

TEST(StepWatch, AddsUpWhatItSeesOfAStep) {
  StepWatch watch;
  EXPECT_EQ(watch.Look(At(10.5), At(11), kPeriod), absl::Seconds(0.5));
  for (int second = 12; second < 50; ++second) {
    EXPECT_EQ(watch.Look(At(10.5), At(second), kPeriod), absl::Seconds(second - 10.5));
  }
}

TEST(StepWatch, BeginsAnewWithEveryStep) {
  StepWatch watch;
  watch.Look(At(10), At(11), kPeriod);
  watch.Look(At(10), At(12), kPeriod);
  EXPECT_EQ(watch.Look(At(12.25), At(13), kPeriod), absl::Seconds(0.75));
  EXPECT_EQ(watch.Look(std::nullopt, At(14), kPeriod), absl::ZeroDuration());
  EXPECT_EQ(watch.Look(At(14.5), At(15), kPeriod), absl::Seconds(0.5));
}

// An hour in which the process stood still, in the middle of a step or right behind its begin.
TEST(StepWatch, TimeThatItDidNotSeeIsTwoPeriodsAtMost) {
  StepWatch watch;
  EXPECT_EQ(watch.Look(At(10), At(11), kPeriod), absl::Seconds(1));
  EXPECT_EQ(watch.Look(At(10), At(3611), kPeriod), absl::Seconds(3));
  EXPECT_EQ(watch.Look(At(10), At(3612), kPeriod), absl::Seconds(4));
  EXPECT_EQ(watch.Look(At(10), At(7212), kPeriod), absl::Seconds(6));
  EXPECT_EQ(watch.Look(At(7212.5), At(9999), kPeriod), absl::Seconds(2));
}

}  // namespace
}  // namespace prefilld
