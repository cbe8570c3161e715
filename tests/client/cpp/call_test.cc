#include "client/cpp/call.h"

#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/cord.h"
#include "google/rpc/error_details.pb.h"

namespace prefilld::client {
namespace {

absl::Status WithRetryInfo(absl::Status status, int64_t delay_ms) {
  google::rpc::RetryInfo info;
  info.mutable_retry_delay()->set_nanos(static_cast<int>(delay_ms * 1000000));
  status.SetPayload("type.googleapis.com/google.rpc.RetryInfo",
                    absl::Cord(info.SerializeAsString()));
  return status;
}

CallOptions Quick() { return {.retry = {.tries_max = 4, .first_delay = absl::Milliseconds(1)}}; }

TEST(RunWithRetries, RetriesOnlyWhatCanHelp) {
  const std::pair<absl::Status, int> cases[] = {
      {absl::UnavailableError("x"), 4},
      {WithRetryInfo(absl::ResourceExhaustedError("x"), 1), 4},
      {absl::ResourceExhaustedError("x"), 1},
      {absl::InvalidArgumentError("x"), 1},
      {absl::DeadlineExceededError("x"), 1},
      {WithRetryInfo(absl::InternalError("x"), 1), 1},
      {absl::OkStatus(), 1},
  };
  for (const auto& [status, expected] : cases) {
    int tries = 0;
    const absl::Status result = RunWithRetries(Quick(), [&](Try&) {
      ++tries;
      return status;
    });
    EXPECT_EQ(result, status);
    EXPECT_EQ(tries, expected) << status;
  }
}

TEST(RunWithRetries, StopsAtTheFirstSuccess) {
  int tries = 0;
  EXPECT_TRUE(RunWithRetries(Quick(), [&](Try&) {
                return ++tries < 3 ? absl::UnavailableError("x") : absl::OkStatus();
              }).ok());
  EXPECT_EQ(tries, 3);
}

TEST(RunWithRetries, CountsTriesAnewAfterProgress) {
  int tries = 0;
  EXPECT_FALSE(RunWithRetries(Quick(), [&](Try& current) {
                 current.progressed = ++tries <= 10;
                 return absl::UnavailableError("x");
               }).ok());
  EXPECT_EQ(tries, 10 + 3) << "the tenth is the first of the last four without progress";
}

TEST(RunWithRetries, WaitsAsLongAsTheServerAsks) {
  int tries = 0;
  const absl::Time start = SteadyNow();
  EXPECT_TRUE(RunWithRetries(Quick(), [&](Try&) {
                return ++tries == 1 ? WithRetryInfo(absl::UnavailableError("x"), 60)
                                    : absl::OkStatus();
              }).ok());
  EXPECT_GE(SteadyNow() - start, absl::Milliseconds(60));
}

TEST(RunWithRetries, BacksOffExponentially) {
  CallOptions options = Quick();
  options.retry = {.tries_max = 5, .first_delay = absl::Milliseconds(10)};
  const absl::Time start = SteadyNow();
  (void)RunWithRetries(options, [](Try&) { return absl::UnavailableError("x"); });
  EXPECT_GE(SteadyNow() - start, absl::Milliseconds(10 + 20 + 40 + 80) / 2);
}

TEST(RunWithRetries, GivesUpWhereTheNextTryWouldComeAfterTheDeadline) {
  CallOptions options = Quick();
  options.timeout = absl::Seconds(20);
  const absl::Time start = SteadyNow();
  const absl::Status status = RunWithRetries(options, [](Try&) {
    google::rpc::RetryInfo info;
    info.mutable_retry_delay()->set_seconds(60);
    absl::Status later = absl::UnavailableError("later");
    later.SetPayload("type.googleapis.com/google.rpc.RetryInfo",
                     absl::Cord(info.SerializeAsString()));
    return later;
  });
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_LT(SteadyNow() - start, absl::Seconds(10));
}

TEST(RunWithRetries, GivesEveryTryTheSameDeadline) {
  CallOptions options = Quick();
  options.timeout = absl::Seconds(100);
  std::vector<std::chrono::system_clock::time_point> deadlines;
  (void)RunWithRetries(options, [&](Try& current) {
    deadlines.push_back(current.context.deadline());
    return absl::UnavailableError("x");
  });
  ASSERT_EQ(deadlines.size(), 4u);
  EXPECT_LT(deadlines.back() - deadlines.front(), std::chrono::milliseconds(10)) << "rounding";
  EXPECT_LE(deadlines.front(), std::chrono::system_clock::now() + std::chrono::seconds(100));
}

TEST(RunWithRetries, IsCancelledBetweenTries) {
  Cancellation cancellation;
  CallOptions options = {.retry = {.first_delay = absl::Seconds(100), .delay_max = absl::Hours(1)},
                         .cancellation = &cancellation};
  std::thread canceller;
  const absl::Time start = SteadyNow();
  const absl::Status status = RunWithRetries(options, [&](Try&) {
    canceller = std::thread([&] { cancellation.Cancel(); });
    return absl::UnavailableError("x");
  });
  canceller.join();
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
  EXPECT_LT(SteadyNow() - start, absl::Seconds(30));
}

TEST(Cancellation, EndsWaitsAndStaysCancelled) {
  Cancellation cancellation;
  EXPECT_FALSE(cancellation.cancelled());
  EXPECT_FALSE(cancellation.WaitFor(absl::Milliseconds(1)));
  std::thread canceller([&] { cancellation.Cancel(); });
  EXPECT_TRUE(cancellation.WaitFor(absl::InfiniteDuration()));
  canceller.join();
  EXPECT_TRUE(cancellation.cancelled());
  EXPECT_TRUE(cancellation.WaitFor(absl::InfiniteDuration()));
}

}  // namespace
}  // namespace prefilld::client
