#include "server/scheduler/policy.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

const absl::Time kNow = absl::FromUnixSeconds(1000);
constexpr absl::Duration kPassedOverMax = absl::Seconds(10);

StepView View(absl::Duration age, absl::Duration remaining) {
  return {.arrival = kNow - age,
          .last_run = kNow - age,
          .deadline = absl::InfiniteFuture(),
          .remaining = remaining};
}

std::optional<size_t> Pick(const std::vector<StepView>& views) {
  return PickNext(views, kNow, kPassedOverMax);
}

TEST(Policy, NothingRunnableIsNothing) {
  EXPECT_EQ(Pick({}), std::nullopt);
  StepView blocked = View(absl::Seconds(1), absl::Seconds(1));
  blocked.runnable = false;
  EXPECT_EQ(Pick({blocked}), std::nullopt);
}

TEST(Policy, EarlierArrivalBreaksATie) {
  EXPECT_EQ(
      Pick({View(absl::Seconds(1), absl::Seconds(1)), View(absl::Seconds(2), absl::Seconds(1))}),
      1u);
}

TEST(Policy, AShortPromptDoesNotWaitForALongOne) {
  EXPECT_EQ(
      Pick({View(absl::Seconds(5), absl::Seconds(100)), View(absl::Seconds(1), absl::Seconds(1))}),
      1u);
}

TEST(Policy, PriorityComesBeforeLength) {
  StepView urgent = View(absl::Seconds(1), absl::Seconds(100));
  urgent.priority = 1;
  EXPECT_EQ(Pick({View(absl::Seconds(2), absl::Seconds(1)), urgent}), 1u);
}

TEST(Policy, ADeadlineInDangerComesBeforePriority) {
  StepView urgent = View(absl::Seconds(1), absl::Seconds(1));
  urgent.priority = 100;
  StepView late = View(absl::Seconds(1), absl::Seconds(5));
  late.deadline = kNow + absl::Seconds(7);
  EXPECT_EQ(Pick({urgent, late}), 1u);
  late.deadline = kNow + absl::Seconds(70);
  EXPECT_EQ(Pick({urgent, late}), 0u);
}

TEST(Policy, LeastSlackFirstAmongDeadlinesInDanger) {
  StepView a = View(absl::Seconds(1), absl::Seconds(5));
  a.deadline = kNow + absl::Seconds(9);
  StepView b = View(absl::Seconds(1), absl::Seconds(5));
  b.deadline = kNow + absl::Seconds(6);
  EXPECT_EQ(Pick({a, b}), 1u);
}

TEST(Policy, WhatWasPassedOverTooLongGoesFirst) {
  StepView urgent = View(absl::Seconds(1), absl::Seconds(1));
  urgent.priority = 100;
  StepView starving = View(absl::Seconds(11), absl::Seconds(100));
  StepView longer = View(absl::Seconds(12), absl::Seconds(100));
  EXPECT_EQ(Pick({urgent, starving, longer}), 2u);
}

}  // namespace
}  // namespace prefilld
