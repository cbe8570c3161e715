#include "server/scheduler/backlog.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

using Answer = Outlook::Answer;
const SteadyTime kNow = absl::FromUnixSeconds(5000);

absl::Duration WaitOf(const Backlog& backlog, const std::string& peer, const Work& more) {
  return backlog.OutlookOf(peer, more, kNow).wait;
}

Work Of(double seconds, double deadline = 0) {
  return {.arrival = kNow,
          .deadline = deadline > 0 ? kNow + absl::Seconds(deadline) : absl::InfiniteFuture(),
          .remaining = absl::Seconds(seconds)};
}

TEST(Backlog, NothingIsWaitedForWhereThereIsNothing) {
  EXPECT_EQ(WaitOf(Backlog(), "a", Of(10)), absl::ZeroDuration());
  EXPECT_EQ(Backlog().OutlookOf("a", Of(10, 10), kNow).answer, Answer::kInTime);
}

// Of its own peer's work for what ranks before it, of another's for as much as it has itself.
TEST(Backlog, AShortJobOfAQuietPeerDoesNotWaitForAllOfIt) {
  Backlog backlog;
  for (int i = 0; i < 60; ++i) backlog.Add("floods", Of(2));
  EXPECT_EQ(WaitOf(backlog, "quiet", Of(0.5)), absl::Seconds(0.5));
  EXPECT_EQ(WaitOf(backlog, "floods", Of(0.5)), absl::ZeroDuration()) << "it is shorter";
  EXPECT_EQ(WaitOf(backlog, "floods", Of(3)), absl::Seconds(120));
  backlog.Add("quiet", Of(0.25));
  EXPECT_EQ(WaitOf(backlog, "quiet", Of(0.5)), absl::Seconds(0.25 + 0.75));
  EXPECT_EQ(WaitOf(backlog, "quiet", Of(500)), absl::Seconds(0.25 + 120));
}

TEST(Backlog, WorkThatTakesTooLongByItselfIsNoQuestionOfTheBacklog) {
  Backlog backlog;
  EXPECT_EQ(backlog.OutlookOf("a", Of(11, 10), kNow).answer, Answer::kInfeasible);
  backlog.Add("a", Of(100, 1));
  EXPECT_EQ(backlog.OutlookOf("a", Of(11, 10), kNow).answer, Answer::kInfeasible);
}

TEST(Backlog, WhatOnlyOthersMakeLateIsToldWhenToComeAgain) {
  Backlog backlog;
  for (int i = 0; i < 9; ++i) backlog.Add("a", Of(1, 10));
  const Outlook late = backlog.OutlookOf("a", Of(1, 10), kNow);
  EXPECT_EQ(late.answer, Answer::kLater);
  EXPECT_GE(late.retry_after, absl::Seconds(1));
  EXPECT_EQ(backlog.OutlookOf("b", Of(1, 10), kNow).answer, Answer::kInTime) << "its own share";
  EXPECT_EQ(backlog.OutlookOf("a", Of(1, 30), kNow).answer, Answer::kInTime);
  EXPECT_EQ(backlog.OutlookOf("a", Of(1), kNow).answer, Answer::kInTime) << "no deadline";
}

// It would be in time itself, at the cost of one that has been admitted.
TEST(Backlog, NobodyIsAdmittedWhoMakesAnotherLate) {
  Backlog backlog;
  backlog.Add("a", Of(9, 10));
  EXPECT_EQ(WaitOf(backlog, "a", Of(2, 60)), absl::Seconds(9));
  EXPECT_EQ(backlog.OutlookOf("a", Of(2, 60), kNow).answer, Answer::kInTime);
  EXPECT_EQ(backlog.OutlookOf("a", Of(2, 4), kNow).answer, Answer::kLater);
  EXPECT_EQ(WaitOf(backlog, "a", Of(2, 2.5)), absl::ZeroDuration());
  EXPECT_EQ(backlog.OutlookOf("a", Of(2, 2.5), kNow).answer, Answer::kLater);
  EXPECT_EQ(backlog.OutlookOf("a", Of(0.5, 0.9), kNow).answer, Answer::kInTime) << "both are";
  Backlog late;
  late.Add("a", Of(11, 10));
  late.Add("a", Of(1, 9));
  EXPECT_EQ(late.OutlookOf("a", Of(2, 60), kNow).answer, Answer::kInTime)
      << "who is late already has no claim";
}

TEST(Backlog, APromiseIsOfWhatWasPredicted) {
  Backlog backlog;
  EXPECT_EQ(backlog.OutlookOf("a", Of(2), kNow).promise, kNow + absl::Seconds(4 * 2 + 5));
  backlog.Add("a", Of(1));
  EXPECT_EQ(backlog.OutlookOf("a", Of(2), kNow).promise, kNow + absl::Seconds(4 * 3 + 5));
}

// Half of the engine's time is there for promises: who comes later is promised less.
TEST(Backlog, APromiseBreaksNone) {
  Work promised = Of(10);
  promised.promise = kNow + absl::Seconds(22);
  Backlog backlog;
  backlog.Add("a", promised);
  EXPECT_EQ(backlog.OutlookOf("a", Of(1), kNow).promise, kNow + absl::Seconds(9)) << "before it";
  const Outlook longer = backlog.OutlookOf("b", Of(2), kNow);
  EXPECT_EQ(longer.promise, kNow + absl::Seconds(20 + 4)) << "behind it";
  EXPECT_EQ(longer.promise, kNow + 4 * (longer.wait + absl::Seconds(2)) + absl::Seconds(5))
      << "and is told so";
}

TEST(Backlog, APromiseThatIsDueIsBeforeALaterDeadline) {
  Work promised = Of(10);
  promised.promise = kNow + absl::Seconds(12);
  Backlog backlog;
  backlog.Add("a", promised);
  EXPECT_EQ(backlog.OutlookOf("a", Of(1, 11), kNow).answer, Answer::kInTime);
  EXPECT_EQ(backlog.OutlookOf("a", Of(1.5, 11.5), kNow).answer, Answer::kInTime);
  EXPECT_EQ(backlog.OutlookOf("a", Of(3, 11), kNow).answer, Answer::kLater);
  EXPECT_EQ(backlog.OutlookOf("a", Of(3, 13), kNow).answer, Answer::kLater);
}

}  // namespace
}  // namespace prefilld
