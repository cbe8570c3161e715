#include "server/scheduler/policy.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

const SteadyTime kNow = absl::FromUnixSeconds(5000);

StepView View(absl::Duration age, absl::Duration remaining) {
  return {.work = {.arrival = kNow - age, .remaining = remaining}};
}

std::optional<size_t> Pick(const std::vector<StepView>& views, bool promises = true) {
  const auto choice = PickNext(views, kNow, promises);
  return choice ? std::optional(choice->view) : std::nullopt;
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
  urgent.work.priority = 1;
  EXPECT_EQ(Pick({View(absl::Seconds(2), absl::Seconds(1)), urgent}), 1u);
}

TEST(Policy, LeastSlackComesBeforePriority) {
  StepView urgent = View(absl::Seconds(1), absl::Seconds(1));
  urgent.work.priority = 100;
  StepView late = View(absl::Seconds(1), absl::Seconds(5));
  late.work.deadline = kNow + absl::Seconds(40);
  EXPECT_EQ(Pick({urgent, late}), 1u) << "no deadline is the most slack";
  urgent.work.deadline = kNow + absl::Seconds(500);
  EXPECT_EQ(Pick({urgent, late}), 1u);
}

TEST(Policy, DeadlinesThatHardlyDifferLeaveTheChoiceToPriority) {
  StepView first = View(absl::Milliseconds(50), absl::Seconds(1));
  first.work.deadline = kNow + absl::Milliseconds(59950);
  StepView urgent = View(absl::Milliseconds(10), absl::Seconds(1));
  urgent.work.deadline = kNow + absl::Milliseconds(59990);
  urgent.work.priority = 1;
  EXPECT_EQ(Pick({first, urgent}), 1u);
}

TEST(Policy, WorkThatIsAlreadyTooLateIsTheMostUrgent) {
  StepView close = View(absl::Seconds(1), absl::Seconds(5));
  close.work.deadline = kNow + absl::Milliseconds(5100);
  StepView late = View(absl::Seconds(1), absl::Seconds(5));
  late.work.deadline = kNow + absl::Seconds(4);
  EXPECT_EQ(Pick({close, late}), 1u);
}

// It does not wait until its promise is broken: there must be twice its work left.
TEST(Policy, APromiseThatIsDueGoesBeforeItsTurn) {
  StepView urgent = View(absl::Seconds(1), absl::Seconds(1));
  urgent.work.priority = 100;
  StepView due = View(absl::Seconds(11), absl::Seconds(100));
  due.work.promise = kNow + absl::Seconds(201);
  EXPECT_EQ(Pick({urgent, due}), 0u);
  due.work.promise = kNow + absl::Seconds(200);
  EXPECT_EQ(Pick({urgent, due}), 1u);
  EXPECT_EQ(Pick({urgent, due}, /*promises=*/false), 0u) << "every second step is the order's";
  EXPECT_TRUE(PickNext({urgent, due}, kNow, true)->promised);
  due.runnable = false;
  EXPECT_EQ(Pick({urgent, due}), 0u);
}

TEST(Policy, PromisesThatAreDueTogetherAreKeptTogether) {
  StepView first = View(absl::Seconds(11), absl::Seconds(10));
  StepView second = View(absl::Seconds(11), absl::Seconds(10));
  const StepView shorter = View(absl::Seconds(0), absl::Seconds(1));
  first.work.promise = kNow + absl::Seconds(30);
  second.work.promise = kNow + absl::Seconds(40);
  EXPECT_EQ(Pick({shorter, second, first}), 2u) << "both need forty seconds";
  second.work.promise = kNow + absl::Seconds(41);
  EXPECT_EQ(Pick({shorter, second, first}), 0u);
}

TEST(Policy, PromisesHaveHalfOfTheTimeAtMost) {
  PromiseTurns turns;
  EXPECT_TRUE(turns.due());
  turns.Ran(true, 1);
  EXPECT_FALSE(turns.due());
  turns.Ran(false, 0.5);
  EXPECT_FALSE(turns.due());
  turns.Ran(false, 0.75);
  EXPECT_TRUE(turns.due());
  for (int step = 0; step < 100; ++step) turns.Ran(false, 0.5);
  turns.Ran(true, 0.25);
  EXPECT_TRUE(turns.due()) << "of a longer step";
  turns.Ran(true, 0.5);
  EXPECT_FALSE(turns.due()) << "no more than one is saved up";
}

TEST(Policy, WhoseServedLeastIsFirstWhateverItsWorkIs) {
  StepView urgent = View(absl::Seconds(9), absl::Seconds(1));
  urgent.work.priority = 100;
  urgent.work.deadline = kNow + absl::Seconds(2);
  urgent.served = 5;
  StepView longer = View(absl::Seconds(1), absl::Seconds(100));
  longer.served = 4;
  EXPECT_EQ(Pick({urgent, longer}), 1u);
  longer.served = 5;
  EXPECT_EQ(Pick({urgent, longer}), 0u);
}

// A deadline an hour away is no reason to go before those without one.
TEST(Policy, AFarDeadlineIsNone) {
  StepView longer = View(absl::Seconds(5), absl::Seconds(20));
  const StepView shorter = View(absl::Seconds(1), absl::Seconds(1));
  longer.work.deadline = kNow + absl::Hours(1);
  EXPECT_EQ(Pick({longer, shorter}), 1u);
  longer.work.deadline = kNow + absl::Seconds(50);
  EXPECT_EQ(Pick({longer, shorter}), 0u);
  longer.work.remaining = absl::Seconds(100);  // ten times that is far
  longer.work.deadline = kNow + absl::Seconds(500);
  EXPECT_EQ(Pick({longer, shorter}), 0u);
  longer.work.deadline = kNow + absl::Seconds(1200);
  EXPECT_EQ(Pick({longer, shorter}), 1u);
}

// Who holds what an urgent one needs goes on before the others.
TEST(Policy, AHolderIsAsUrgentAsWhoWaitsForIt) {
  StepView holder = View(absl::Seconds(1), absl::Seconds(50));
  holder.work.priority = -100;
  const StepView other = View(absl::Seconds(1), absl::Seconds(1));
  StepView urgent = View(absl::Seconds(1), absl::Seconds(9));
  urgent.work.priority = 100;
  urgent.runnable = false;
  EXPECT_EQ(Pick({holder, other, urgent}), 1u);
  urgent.waits_for = 0;
  EXPECT_EQ(Pick({holder, other, urgent}), 0u);
  urgent.work.priority = 0;
  urgent.work.deadline = kNow + absl::Seconds(10);
  EXPECT_EQ(Pick({holder, other, urgent}), 0u);
  urgent.work.deadline = absl::InfiniteFuture();
  holder.served = 1;
  urgent.served = -1;
  EXPECT_EQ(Pick({holder, other, urgent}), 0u) << "its peer was served least";
}

}  // namespace
}  // namespace prefilld
