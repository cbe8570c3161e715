#include "server/scheduler/policy.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

const SteadyTime kNow = absl::FromUnixSeconds(5000);
constexpr absl::Duration kPassedOverMax = absl::Seconds(10);

StepView View(absl::Duration age, absl::Duration remaining) {
  return {.arrival = kNow - age,
          .waited = age,
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

TEST(Policy, LeastSlackComesBeforePriority) {
  StepView urgent = View(absl::Seconds(1), absl::Seconds(1));
  urgent.priority = 100;
  StepView late = View(absl::Seconds(1), absl::Seconds(5));
  late.deadline = kNow + absl::Seconds(40);
  EXPECT_EQ(Pick({urgent, late}), 1u) << "no deadline is the most slack";
  urgent.deadline = kNow + absl::Seconds(500);
  EXPECT_EQ(Pick({urgent, late}), 1u);
}

TEST(Policy, DeadlinesThatHardlyDifferLeaveTheChoiceToPriority) {
  StepView first = View(absl::Milliseconds(50), absl::Seconds(1));
  first.deadline = kNow + absl::Milliseconds(59950);
  StepView urgent = View(absl::Milliseconds(10), absl::Seconds(1));
  urgent.deadline = kNow + absl::Milliseconds(59990);
  urgent.priority = 1;
  EXPECT_EQ(Pick({first, urgent}), 1u);
}

TEST(Policy, WorkThatIsAlreadyTooLateIsTheMostUrgent) {
  StepView close = View(absl::Seconds(1), absl::Seconds(5));
  close.deadline = kNow + absl::Milliseconds(5100);
  StepView late = View(absl::Seconds(1), absl::Seconds(5));
  late.deadline = kNow + absl::Seconds(4);
  EXPECT_EQ(Pick({close, late}), 1u);
}

TEST(Policy, WhatWasPassedOverTooLongGoesFirst) {
  StepView urgent = View(absl::Seconds(1), absl::Seconds(1));
  urgent.priority = 100;
  StepView starving = View(absl::Seconds(11), absl::Seconds(100));
  StepView longer = View(absl::Seconds(12), absl::Seconds(100));
  EXPECT_EQ(Pick({urgent, starving, longer}), 2u);
}

// A layer of ten parts gets on once in ten seconds, as one of one part does; between two layers it
// is not more urgent than others.
TEST(Policy, WhatIsInTheMiddleOfALayerWaitsForItsShareOfTheBound) {
  StepView longer = View(absl::Seconds(2), absl::Seconds(100));
  const StepView shorter = View(absl::Seconds(0), absl::Seconds(1));
  EXPECT_EQ(Pick({longer, shorter}), 1u);
  longer.parts = 10;
  EXPECT_EQ(Pick({longer, shorter}), 0u);
  longer.waited = absl::Milliseconds(900);
  EXPECT_EQ(Pick({longer, shorter}), 1u);
}

// A deadline an hour away is no reason to go before those without one.
TEST(Policy, AFarDeadlineIsNone) {
  StepView longer = View(absl::Seconds(5), absl::Seconds(20));
  const StepView shorter = View(absl::Seconds(1), absl::Seconds(1));
  longer.deadline = kNow + absl::Hours(1);
  EXPECT_EQ(Pick({longer, shorter}), 1u);
  longer.deadline = kNow + absl::Seconds(50);
  EXPECT_EQ(Pick({longer, shorter}), 0u);
  longer.remaining = absl::Seconds(100);  // ten times that is far
  longer.deadline = kNow + absl::Seconds(500);
  EXPECT_EQ(Pick({longer, shorter}), 0u);
  longer.deadline = kNow + absl::Seconds(1200);
  EXPECT_EQ(Pick({longer, shorter}), 1u);
}

// Who holds what an urgent one needs goes on before the others.
TEST(Policy, AHolderIsAsUrgentAsWhoWaitsForIt) {
  StepView holder = View(absl::Seconds(1), absl::Seconds(50));
  holder.priority = -100;
  const StepView other = View(absl::Seconds(1), absl::Seconds(1));
  StepView urgent = View(absl::Seconds(1), absl::Seconds(9));
  urgent.priority = 100;
  urgent.runnable = false;
  EXPECT_EQ(Pick({holder, other, urgent}), 1u);
  urgent.waits_for = 0;
  EXPECT_EQ(Pick({holder, other, urgent}), 0u);
  urgent.priority = 0;
  urgent.deadline = kNow + absl::Seconds(10);
  EXPECT_EQ(Pick({holder, other, urgent}), 0u);
}

}  // namespace
}  // namespace prefilld
